//! An image of a job as it is read: a bare URI, or an object with `uri` and, optionally, `id`.
//!
//! Read in one pass. Serde's own "either of these" (`untagged`) first copies each entry into a tree,
//! keys and all, and a job has a thousand of them. What is neither gets one sentence that says what
//! an image is, after the whole entry was read: so the position in the message is the entry's end.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::ImageRef;

const EXPECTED: &str = "an image is a URI or an object with `uri` and, optionally, `id`";

impl<'de> Deserialize<'de> for ImageRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.deserialize_any(Entry)? {
            Some(image) => Ok(image),
            None => Err(D::Error::custom(EXPECTED)),
        }
    }
}

/// Reads an entry to its end; none if it is no image.
struct Entry;

impl<'de> Visitor<'de> for Entry {
    type Value = Option<ImageRef>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_str<E: Error>(self, uri: &str) -> Result<Self::Value, E> {
        self.visit_string(uri.to_owned())
    }

    fn visit_string<E: Error>(self, uri: String) -> Result<Self::Value, E> {
        Ok(Some(ImageRef { uri, id: None }))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut uri, mut id) = (None, None);
        let mut twice = false;
        while let Some(key) = map.next_key()? {
            match key {
                Key::Uri => twice |= uri.replace(map.next_value::<Value>()?).is_some(),
                Key::Id => twice |= id.replace(map.next_value::<Value>()?).is_some(),
                Key::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        let id = match id {
            Some(Value::Text(id)) => Some(id),
            Some(Value::Null) | None => None,
            Some(Value::Other) => return Ok(None),
        };
        match uri {
            Some(Value::Text(uri)) if !twice => Ok(Some(ImageRef { uri, id })),
            _ => Ok(None),
        }
    }

    // What is no image, to its end.

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }
}

/// A key of an image's object.
#[derive(serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Key {
    Uri,
    Id,
    #[serde(other)]
    Other,
}

/// A value that should be a text or null.
enum Value {
    Text(String),
    Null,
    Other,
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Other)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Value, E> {
        Ok(Value::Other)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Value, E> {
        Ok(Value::Other)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Value, E> {
        Ok(Value::Other)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What serde makes of the same rules: slower, and the measure of what is read here.
    #[derive(serde::Deserialize)]
    #[serde(
        untagged,
        expecting = "an image is a URI or an object with `uri` and, optionally, `id`"
    )]
    enum Reference {
        Uri(String),
        Object { uri: String, id: Option<String> },
    }

    #[derive(serde::Deserialize)]
    struct Message<T> {
        images: Vec<T>,
    }

    /// The images, or the error's text with its place.
    fn read(message: &str) -> (Result<Vec<ImageRef>, String>, Result<Vec<ImageRef>, String>) {
        let ours = serde_json::from_str::<Message<ImageRef>>(message);
        let reference = serde_json::from_str::<Message<Reference>>(message);
        let plain = |image| match image {
            Reference::Uri(uri) => ImageRef { uri, id: None },
            Reference::Object { uri, id } => ImageRef { uri, id },
        };
        (
            ours.map(|message| message.images).map_err(|e| e.to_string()),
            reference
                .map(|message| message.images.into_iter().map(plain).collect())
                .map_err(|e| e.to_string()),
        )
    }

    #[test]
    fn entries_are_read_as_serde_reads_them_and_refused_in_its_words() {
        let entries = [
            r#""s3://b/k""#,
            r#""""#,
            r#""\u00fc\n\"""#,
            r#"{"uri": "u"}"#,
            r#"{"uri": "u", "id": "i"}"#,
            r#"{"id": "i", "uri": "u\t"}"#,
            r#"{"uri": "u", "id": null, "more": {"a": [1, {"b": 2}]}}"#,
            r#"{"uri": "u", "URI": 7}"#,
            r#"{"uri": null}"#,
            r#"{"uri": 7}"#,
            r#"{"uri": ["u"], "id": "i"}"#,
            r#"{"uri": "u", "id": 7}"#,
            r#"{"uri": "u", "id": {"a": [1]}}"#,
            r#"{"uri": "u", "id": [true], "x": 1}"#,
            r#"{"uri": "u", "uri": "v"}"#,
            r#"{"uri": "u", "id": "i", "id": "j"}"#,
            r#"{"id": "i"}"#,
            "{}",
            "[]",
            r#"["u"]"#,
            r#"["u", "i"]"#,
            "null",
            "true",
            "7",
            "-7",
            "7.5",
            "1e400",
            "18446744073709551616",
            r#"{"uri": "u""#,
            r#"{"uri": "u",}"#,
            r#"{"uri" "u"}"#,
            r#"{"uri": "u", "id": 7, "more": nonsense}"#,
            r#"{"uri": 7, "more": "#,
            r#"{7: "u"}"#,
            r#""broken \x""#,
            "\"\n\"",
            "nonsense",
            "",
        ];
        for entry in entries {
            for message in [
                format!("{{\"images\": [{entry}]}}"),
                format!("{{\"id\": \"j\",\n\"images\": [\"a\",\n {entry} , \"z\"], \"top_k\": 1}}"),
            ] {
                let (ours, reference) = read(&message);
                assert_eq!(ours, reference, "{message}");
            }
        }
    }
}
