//! Addresses of brokers: read strictly, shown without user, password and parameters.
//!
//! No error here quotes what it refuses. A password with an `@` or a `/` that is not escaped moves
//! to another part of the URL, and the URL parser accepts that: it would be shown as a virtual host.

use std::fmt;
use std::net::Ipv6Addr;

use lapin::uri::{AMQPScheme, AMQPUri};

/// The heartbeat of a connection whose address names none, in seconds: a broker that has become
/// silent is given up after two. lapin's default is the broker's proposal, RabbitMQ's is 60.
const HEARTBEAT_SECONDS: u16 = 10;

/// The most addresses in `amqp.url`.
const MAX_ADDRESSES: usize = 16;

/// Why `amqp.url` cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("amqp.url{} {reason}", which(*.number))]
pub struct UrlError {
    /// The address, from 1; `None` if it is the only one, or all are meant.
    number: Option<usize>,
    reason: &'static str,
}

fn which(number: Option<usize>) -> String {
    number.map(|number| format!(": address {number}")).unwrap_or_default()
}

/// A broker's address.
#[derive(Clone)]
pub struct Address {
    /// What lapin needs. Its `Display` and `Debug` show the password.
    pub uri: AMQPUri,
    /// Everything but user, password and parameters.
    shown: String,
    user_is_shown: bool,
}

impl Address {
    /// Whether TLS is spoken there.
    pub fn is_tls(&self) -> bool {
        self.uri.scheme == AMQPScheme::AMQPS
    }

    /// `host:port`, with the brackets of an IPv6 address.
    pub fn host_and_port(&self) -> String {
        let (host, port) = (&self.uri.authority.host, self.uri.authority.port);
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }

    /// The user, for messages. `None` if the URL has a user and no password: what is in the
    /// user's place may be the password.
    pub fn user(&self) -> Option<&str> {
        self.user_is_shown.then_some(self.uri.authority.userinfo.username.as_str())
    }

    fn parse(text: &str) -> Result<Self, &'static str> {
        const FORM: &str = "is not of the form amqp://user:password@host:port/vhost (or amqps://)";
        let text = text.trim();
        if text.is_empty() {
            return Err("is empty");
        }
        let (scheme, rest) = after_scheme(text).ok_or(FORM)?;
        let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        // Also what was meant as a second address, or as part of a password.
        if path.contains(['@', ':', ',', ';', '#']) || rest.contains(char::is_whitespace) {
            return Err(
                "has one of @ : , ; # or a space after the host: write them percent-encoded \
                 in the virtual host (@ is %40) and in a password (/ is %2f, ? is %3f, # is %23)",
            );
        }
        let mut uri: AMQPUri = text.parse().map_err(|_| FORM)?;
        let (user, host) = authority.rsplit_once('@').unwrap_or(("", authority));
        // lapin's parser takes only names, and localhost in the place of an IPv6 address.
        if let Some(rest) = host.strip_prefix('[') {
            let (ip, _) = rest.split_once(']').ok_or(FORM)?;
            uri.authority.host = ip.parse::<Ipv6Addr>().map_err(|_| FORM)?.to_string();
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
        let vhost = path.split('?').next().unwrap_or_default();
        let user_is_shown = user.is_empty() || user.contains(':');
        let mut address = Self { uri, shown: String::new(), user_is_shown };
        address.shown = format!("{scheme}{}{vhost}", address.host_and_port());
        Ok(address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Reads `amqp.url`: one address, or several separated by commas. A comma that is not followed by
/// `amqp://` or `amqps://` belongs to the address, for example to its password.
///
/// # Errors
/// [`UrlError`].
pub fn addresses(text: &str) -> Result<Vec<Address>, UrlError> {
    let parts = split(text);
    let all = |reason| UrlError { number: None, reason };
    if parts.len() > MAX_ADDRESSES {
        return Err(all("has more than 16 addresses"));
    }
    let number = |at: usize| (parts.len() > 1).then_some(at + 1);
    let mut found: Vec<Address> = Vec::new();
    for (at, part) in parts.iter().enumerate() {
        let wrong = |reason| UrlError { number: number(at), reason };
        found.push(Address::parse(part).map_err(wrong)?);
    }
    if found.iter().any(|address| address.uri.vhost != found[0].uri.vhost) {
        return Err(all("names several virtual hosts: all addresses must lead to the same one"));
    }
    Ok(found)
}

/// The addresses, for logs and messages.
pub fn shown(addresses: &[Address]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn split(text: &str) -> Vec<&str> {
    let mut begins = vec![0];
    let commas = text.match_indices(',').map(|(at, _)| at + 1);
    begins.extend(commas.filter(|at| after_scheme(text[*at..].trim_start()).is_some()));
    let ends = begins[1..].iter().map(|begin| begin - 1).chain([text.len()]);
    begins.iter().zip(ends).map(|(begin, end)| &text[*begin..end]).collect()
}

/// The scheme with its slashes, and what follows them.
fn after_scheme(text: &str) -> Option<(&'static str, &str)> {
    ["amqp://", "amqps://"].into_iter().find_map(|scheme| {
        let (head, rest) = text.split_at_checked(scheme.len())?;
        head.eq_ignore_ascii_case(scheme).then_some((scheme, rest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Address {
        let mut all = addresses(text).unwrap();
        assert_eq!(all.len(), 1, "{text}");
        all.remove(0)
    }

    #[test]
    fn an_address_is_shown_without_user_password_and_parameters() {
        for (url, shown) in [
            ("amqp://u:p@h:5673/v?heartbeat=5", "amqp://h:5673/v"),
            ("amqps://u:p@h/%2f", "amqps://h:5671/%2f"),
            ("amqp://u:p@ss@h", "amqp://h:5672"),
            ("amqp://u:a,b@h/v", "amqp://h:5672/v"),
            ("AMQP://u:p@[::1]:1/v", "amqp://[::1]:1/v"),
            (" amqp://h ", "amqp://h:5672"),
        ] {
            let address = one(url);
            assert_eq!((address.to_string(), format!("{address:?}")), (shown.into(), shown.into()));
        }
        assert_eq!(one("amqp://u:p@h/").user(), Some("u"));
        assert_eq!(
            (one("amqp://hunter2@h/").user(), one("amqp://h/").user()),
            (None, Some("guest"))
        );
    }

    #[test]
    fn an_ipv6_address_is_a_host_of_its_own() {
        let address = one("amqp://u:p@[2001:db8::7]:5673/%2f");
        let authority = &address.uri.authority;
        assert_eq!((authority.host.as_str(), authority.port), ("2001:db8::7", 5673));
        assert_eq!(address.uri.vhost, "/");
        assert_eq!(one("amqp://u:p@[::1]/").host_and_port(), "[::1]:5672");
        assert_eq!(one("amqp://u:p@127.0.0.1/").host_and_port(), "127.0.0.1:5672");
    }

    #[test]
    fn the_heartbeat_is_short_unless_the_address_names_one() {
        let heartbeat = |url| one(url).uri.query.heartbeat;
        assert_eq!(heartbeat("amqp://h/"), Some(10));
        assert_eq!(heartbeat("amqp://h/?heartbeat=3"), Some(3));
        assert_eq!(heartbeat("amqp://h/?heartbeat=0"), Some(0));
        let query = one("amqp://h/?connection_timeout=9&auth_mechanism=external").uri.query;
        assert_eq!(query.connection_timeout, Some(9));
        assert!(query.auth_mechanism.is_some());
    }

    #[test]
    fn several_addresses_are_separated_by_commas() {
        let all = addresses("amqp://u:p,q@a/v, amqps://u:x@b:1/v,AMQP://[::1]/v").unwrap();
        assert_eq!(shown(&all), "amqp://a:5672/v, amqps://b:1/v, amqp://[::1]:5672/v");
        assert_eq!(all[0].uri.authority.userinfo.password, "p,q");
        let error = addresses("amqp://a/v,amqp://u:p@b:x/v").unwrap_err().to_string();
        assert!(error.starts_with("amqp.url: address 2 is not of the form"), "{error}");
        let error = addresses("amqp://a/v,amqp://b/w").unwrap_err().to_string();
        assert!(error.contains("several virtual hosts"), "{error}");
        assert!(addresses(&vec!["amqp://a"; 17].join(",")).is_err());
        assert!(addresses(&vec!["amqp://a"; 16].join(",")).is_ok());
        assert!(addresses("").unwrap_err().to_string().contains("is empty"));
    }

    #[test]
    fn no_malformed_address_shows_its_password() {
        // In each place where a part or a separator is forgotten, doubled or not escaped.
        for url in [
            "hunter2",
            "amqp:u:hunter2@h/v",
            "amqp:/u:hunter2@h/v",
            "amqp:///u:hunter2@h/v",
            "amqp//u:hunter2@h/v",
            "u:hunter2@h/v",
            "http://u:hunter2@h/v",
            "amqp://u:1/hunter2@h/v",
            "amqp://u:1?hunter2@h/v",
            "amqp://u:1#hunter2@h/v",
            "amqp://u:hunter2/v",
            "amqp://u:hunter2@/v",
            "amqp://u:hunter2@h:port/v",
            "amqp://u:hunter2@h:99999/v",
            "amqp://u:hunter2@[::1/v",
            "amqp://u:hunter2@[::zz]/v",
            "amqp://u:hunter2@h h/v",
            "amqp://h/u:hunter2",
            "amqp://h/v;amqp://u:hunter2@h/v",
            "amqp://h/v amqp://u:hunter2@h/v",
            "amqp://h/v,u:hunter2@h/v",
            "amqp://h/v,hunter2",
            "amqp://h/v,amqp:u:hunter2@h/v",
            "amqp://h/v,http://u:hunter2@h/v",
            "amqp://h/v,amqp://u:hunter2@h:x/v",
            "amqp://h/v,amqp://u:1/hunter2@h/v",
            "amqp://h:1,u:hunter2@h/v",
            "amqp://h/v#hunter2",
            "amqp://u:hunter2%zz%ff@h/v",
            "[\"amqp://u:hunter2@h/v\"]",
            "\"amqp://u:hunter2@h/v\"",
        ] {
            let said = match addresses(url) {
                Ok(found) => format!("{} {:?}", shown(&found), found[0].user()),
                Err(error) => format!("{error} {error:?}"),
            };
            assert!(!said.contains("hunter2"), "{url}: {said}");
        }
        // These are addresses, if strange ones.
        for url in ["amqp://hunter2@h/v", "amqp://u;hunter2@h/v", "amqp://h/v?password=hunter2"] {
            let address = one(url);
            let said = format!("{address} {address:?} {:?}", address.user());
            assert!(!said.contains("hunter2"), "{url}: {said}");
        }
    }
}
