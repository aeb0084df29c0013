//! `amqp.url`: one address, or several. Nothing here quotes what it refuses.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};

/// Addresses of brokers, separated by commas, as they were given.
#[derive(Clone, PartialEq, Eq)]
pub struct Urls(String);

impl Urls {
    /// As [`addresses`](angler_amqp::address::addresses) reads them.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Urls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrMore)
    }
}

struct OneOrMore;

/// A value of another type, such as a number in the environment, may be a password.
fn wrong<E: Error>() -> E {
    E::custom("amqp.url must be a URL or a list of URLs")
}

impl<'de> Visitor<'de> for OneOrMore {
    type Value = Urls;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a URL or a list of URLs")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Urls, E> {
        Ok(Urls(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Urls, A::Error> {
        let mut all = Vec::new();
        while let Some(Urls(text)) = list.next_element()? {
            all.push(text);
        }
        Ok(Urls(all.join(",")))
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Urls, E> {
        Err(wrong())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Urls, E> {
        Err(wrong())
    }

    fn visit_i128<E: Error>(self, _: i128) -> Result<Urls, E> {
        Err(wrong())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Urls, E> {
        Err(wrong())
    }

    fn visit_u128<E: Error>(self, _: u128) -> Result<Urls, E> {
        Err(wrong())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Urls, E> {
        Err(wrong())
    }
}
