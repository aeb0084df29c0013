//! One frame, checked as strictly as lapin parses it, and rewritten if lapin could not.

use super::UNPARSABLE;

/// Frames that carry a method, and those that carry a message's properties.
const METHOD: u8 = 1;
const HEADER: u8 = 2;
/// The two methods that say where a producer's message was published to.
const DELIVER: [u8; 4] = [0, 60, 0, 60];
const GET_OK: [u8; 4] = [0, 60, 0, 71];

/// Class, weight and body size, in front of a message's properties.
const FIXED: usize = 12;
/// The bit of the headers among the property flags.
const HEADERS: u16 = 1 << 13;
/// Headers may be nested this deep. lapin parses and drops them by recursion, on a thread's stack.
const DEPTH: usize = 32;
/// A payload that every peer accepts: AMQP's smallest `frame_max` is 4,096 bytes, frame included.
const ALWAYS_FITS: usize = 4_088;
/// Problems that are described, and the bytes of each description. With all short strings at their
/// longest, they fit into [`ALWAYS_FITS`].
const MOST_PROBLEMS: usize = 8;
const PROBLEM: usize = 120;

/// The properties in the order of their flags, from the highest bit down. Lower bits are not used.
const PROPERTIES: [(&str, Kind); 14] = [
    ("content_type", Kind::ShortString),
    ("content_encoding", Kind::ShortString),
    ("headers", Kind::Table),
    ("delivery_mode", Kind::Bytes(1)),
    ("priority", Kind::Bytes(1)),
    ("correlation_id", Kind::ShortString),
    ("reply_to", Kind::ShortString),
    ("expiration", Kind::ShortString),
    ("message_id", Kind::ShortString),
    ("timestamp", Kind::Bytes(8)),
    ("type", Kind::ShortString),
    ("user_id", Kind::ShortString),
    ("app_id", Kind::ShortString),
    ("cluster_id", Kind::ShortString),
];

/// How a field is written.
#[derive(Clone, Copy)]
enum Kind {
    Bytes(usize),
    ShortString,
    Table,
}

/// `true` if a frame of this kind can hold a producer's bytes that lapin cannot parse.
pub(super) fn may_need_rewrite(kind: u8) -> bool {
    matches!(kind, METHOD | HEADER)
}

/// Rewrites the payload of a frame so that lapin can parse it; `None` if lapin can parse it as it is.
///
/// A rewritten payload is at most as long as the old one, or 4,088 bytes.
pub fn rewrite(kind: u8, payload: &[u8]) -> Option<Vec<u8>> {
    match kind {
        METHOD => method(payload),
        HEADER => header(payload),
        _ => None,
    }
}

/// What was wrong with a frame.
#[derive(Default)]
struct Problems {
    count: usize,
    text: String,
}

impl Problems {
    fn add(&mut self, problem: &str) {
        self.count += 1;
        let separator = if self.count == 1 { "" } else { "; " };
        match self.count {
            ..=MOST_PROBLEMS => self.text += &format!("{separator}{}", cut(problem, PROBLEM)),
            more if more == MOST_PROBLEMS + 1 => self.text += "; and more",
            _ => {}
        }
    }

    /// Writes a short string. One that is not UTF-8 is escaped, and added as a problem of `what`.
    fn short_string(&mut self, bytes: &[u8], out: &mut Vec<u8>, what: &str) {
        match std::str::from_utf8(bytes) {
            Ok(_) => push_short(bytes, out),
            Err(_) => {
                let escaped = escape(bytes);
                self.add(&format!("{what} \"{escaped}\" is not UTF-8"));
                push_short(cut(&escaped, 255).as_bytes(), out);
            }
        }
    }
}

/// Text with its bytes that are not UTF-8 as `\xff`.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() + 16);
    for chunk in bytes.utf8_chunks() {
        text += chunk.valid();
        for byte in chunk.invalid() {
            text += &format!("\\x{byte:02x}");
        }
    }
    text
}

/// The beginning of a text, at most this many bytes.
fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

/// At most 255 bytes.
fn push_short(bytes: &[u8], out: &mut Vec<u8>) {
    out.push(bytes.len() as u8);
    out.extend_from_slice(bytes);
}

fn push_long(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    out.extend_from_slice(bytes);
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(count)?;
    *rest = left;
    Some(taken)
}

fn take_short<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = take(rest, 1)?[0];
    take(rest, length.into())
}

fn take_long<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = take(rest, 4)?;
    take(rest, u32::from_be_bytes(length.try_into().ok()?) as usize)
}

fn method(payload: &[u8]) -> Option<Vec<u8>> {
    use Kind::{Bytes, ShortString};
    let (id, mut rest) = payload.split_at_checked(4)?;
    // Consumer tag, delivery tag and redelivered, exchange, routing key; the same without a consumer
    // tag, and the number of messages left.
    let fields = match id {
        id if id == DELIVER => [ShortString, Bytes(9), ShortString, ShortString],
        id if id == GET_OK => [Bytes(9), ShortString, ShortString, Bytes(4)],
        _ => return None,
    };
    let (mut problems, mut out) = (Problems::default(), id.to_vec());
    for field in fields {
        match field {
            Bytes(count) => out.extend_from_slice(take(&mut rest, count)?),
            _ => problems.short_string(take_short(&mut rest)?, &mut out, "the routing key"),
        }
    }
    (problems.count > 0).then_some(out)
}

fn header(payload: &[u8]) -> Option<Vec<u8>> {
    let (fixed, properties) = payload.split_at_checked(FIXED)?;
    let mut problems = Problems::default();
    let read = Properties::read(properties, &mut problems);
    if read.is_none() {
        problems.add("the properties are not of the form that AMQP prescribes");
    }
    if problems.count == 0 {
        return None;
    }
    let mut read = read.unwrap_or_default();
    let rewritten = read.write(fixed, &problems.text);
    if rewritten.len() <= payload.len().max(ALWAYS_FITS) {
        return Some(rewritten);
    }
    problems.text.insert_str(0, "the headers are left out, they have no room; ");
    read.headers.clear();
    Some(read.write(fixed, &problems.text))
}

/// A message's properties, rewritten.
#[derive(Default)]
struct Properties {
    /// Of all but the headers.
    flags: u16,
    before_headers: Vec<u8>,
    /// The entries of the table.
    headers: Vec<u8>,
    after_headers: Vec<u8>,
}

impl Properties {
    /// `None` if they end too early, too late or with something unknown.
    fn read(mut rest: &[u8], problems: &mut Problems) -> Option<Self> {
        let flags = take(&mut rest, 2)?;
        let flags = u16::from_be_bytes(flags.try_into().ok()?);
        let mut read = Self { flags: flags & !HEADERS, ..Self::default() };
        let mut out = &mut read.before_headers;
        for (number, (name, kind)) in PROPERTIES.into_iter().enumerate() {
            let is_set = flags & (1 << (15 - number)) != 0;
            match kind {
                Kind::Table => {
                    if is_set {
                        let table = take_long(&mut rest)?;
                        read_table(table, &mut read.headers, DEPTH, problems)?;
                    }
                    out = &mut read.after_headers;
                }
                Kind::ShortString if is_set => {
                    problems.short_string(take_short(&mut rest)?, out, name);
                }
                Kind::Bytes(count) if is_set => out.extend_from_slice(take(&mut rest, count)?),
                Kind::ShortString | Kind::Bytes(_) => {}
            }
        }
        // The lowest bits are for properties that AMQP has not defined.
        (rest.is_empty() && flags & 0b11 == 0).then_some(read)
    }

    /// The payload of a frame, with one more header.
    fn write(&self, fixed: &[u8], problems: &str) -> Vec<u8> {
        let mut headers = self.headers.clone();
        push_short(UNPARSABLE.as_bytes(), &mut headers);
        headers.push(b'S');
        push_long(problems.as_bytes(), &mut headers);
        let mut out = fixed.to_vec();
        out.extend_from_slice(&(self.flags | HEADERS).to_be_bytes());
        out.extend_from_slice(&self.before_headers);
        push_long(&headers, &mut out);
        out.extend_from_slice(&self.after_headers);
        out
    }
}

/// Copies the entries of a table.
fn read_table(
    mut rest: &[u8],
    out: &mut Vec<u8>,
    depth: usize,
    problems: &mut Problems,
) -> Option<()> {
    while !rest.is_empty() {
        problems.short_string(take_short(&mut rest)?, out, "the name of a header");
        read_value(&mut rest, out, depth, problems)?;
    }
    Some(())
}

/// Copies one value with its type.
fn read_value(
    rest: &mut &[u8],
    out: &mut Vec<u8>,
    depth: usize,
    problems: &mut Problems,
) -> Option<()> {
    let kind = take(rest, 1)?[0];
    let fixed = match kind {
        b'V' => 0,
        b't' | b'b' | b'B' => 1,
        b's' | b'U' | b'u' => 2,
        b'I' | b'i' | b'f' => 4,
        b'D' => 5,
        b'l' | b'L' | b'd' | b'T' => 8,
        b'S' | b'x' => {
            let bytes = take_long(rest)?;
            out.push(kind);
            push_long(bytes, out);
            return Some(());
        }
        b'A' | b'F' => {
            let mut inner = take_long(rest)?;
            if depth == 0 {
                problems.add(&format!("a header is nested more than {DEPTH} levels deep"));
                out.push(b'V');
                return Some(());
            }
            out.push(kind);
            let start = out.len();
            push_long(&[], out);
            match kind {
                b'F' => read_table(inner, out, depth - 1, problems)?,
                _ => {
                    while !inner.is_empty() {
                        read_value(&mut inner, out, depth - 1, problems)?;
                    }
                }
            }
            let length = (out.len() - start - 4) as u32;
            out[start..start + 4].copy_from_slice(&length.to_be_bytes());
            return Some(());
        }
        _ => return None,
    };
    out.push(kind);
    out.extend_from_slice(take(rest, fixed)?);
    Some(())
}

#[cfg(test)]
mod tests {
    use lapin::BasicProperties;
    use lapin::protocol::basic::parse_properties;
    use lapin::types::{AMQPValue, ShortString};

    use super::*;

    const CORRELATION_ID: u16 = 1 << 10;
    const MESSAGE_ID: u16 = 1 << 7;

    fn short(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        push_short(bytes, &mut out);
        out
    }

    fn long(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        push_long(bytes, &mut out);
        out
    }

    fn payload(flags: u16, properties: &[u8]) -> Vec<u8> {
        [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9][..], &flags.to_be_bytes(), properties].concat()
    }

    /// What lapin reads out of a frame that had to be rewritten.
    fn rewritten(payload: &[u8]) -> (BasicProperties, String) {
        let parse = |payload: &[u8]| match parse_properties(&payload[FIXED..]) {
            Ok(([], properties)) => Some(properties),
            _ => None,
        };
        assert_eq!(parse(payload), None, "lapin can parse it");
        let new = rewrite(HEADER, payload).unwrap();
        assert_eq!(new[..FIXED], payload[..FIXED]);
        let properties = parse(&new).unwrap();
        let headers = properties.headers().clone().unwrap();
        let problem = crate::string_header(&headers, UNPARSABLE).unwrap();
        (properties, problem)
    }

    #[test]
    fn text_that_is_not_utf8_is_escaped_and_the_rest_is_kept() {
        let text = [short(b"mine-\xff"), short("möglich".as_bytes())].concat();
        let (properties, problem) = rewritten(&payload(CORRELATION_ID | MESSAGE_ID, &text));
        let text = |text: &Option<ShortString>| text.as_ref().unwrap().to_string();
        assert_eq!(text(properties.correlation_id()), "mine-\\xff");
        assert_eq!(text(properties.message_id()), "möglich");
        assert_eq!(problem, "correlation_id \"mine-\\xff\" is not UTF-8");
    }

    #[test]
    fn headers_with_names_that_are_not_utf8_keep_their_values() {
        let inner = [short(b"in\xfe"), vec![b'l'], 7_i64.to_be_bytes().to_vec()].concat();
        let table = [
            short(b"tenant\xff"),
            [vec![b'S'], long(b"a\xff")].concat(),
            short(b"list"),
            [vec![b'A'], long(&[vec![b'F'], long(&inner)].concat())].concat(),
        ]
        .concat();
        let (properties, problem) =
            rewritten(&payload(HEADERS | MESSAGE_ID, &[long(&table), short(b"id")].concat()));
        assert_eq!(properties.message_id().as_ref().unwrap().as_str(), "id");
        let headers = properties.headers().as_ref().unwrap().inner();
        assert_eq!(headers["tenant\\xff"], AMQPValue::LongString(b"a\xff".as_slice().into()));
        let AMQPValue::FieldArray(list) = &headers["list"] else { panic!("{headers:?}") };
        let AMQPValue::FieldTable(inner) = &list.as_slice()[0] else { panic!("{list:?}") };
        assert_eq!(inner.inner()["in\\xfe"], AMQPValue::LongLongInt(7));
        assert!(problem.contains("tenant\\xff") && problem.contains("in\\xfe"), "{problem}");
    }

    #[test]
    fn headers_that_are_nested_too_deep_are_cut() {
        let nested = |depth: usize| {
            let mut value = vec![b'V'];
            for _ in 0..depth {
                value = [vec![b'A'], long(&value)].concat();
            }
            payload(HEADERS, &long(&[short(b"deep"), value].concat()))
        };
        assert_eq!(rewrite(HEADER, &nested(DEPTH)), None);
        for depth in [DEPTH + 1, 20_000] {
            let new = rewrite(HEADER, &nested(depth)).unwrap();
            assert!(parse_properties(&new[FIXED..]).is_ok_and(|(rest, _)| rest.is_empty()));
            assert!(String::from_utf8_lossy(&new).contains("32 levels deep"));
        }
    }

    #[test]
    fn a_frame_never_outgrows_what_the_peer_accepts() {
        // Escaped, these names are four times as long.
        let entry = [short(&[0xff; 60]), vec![b'V']].concat();
        let all = [long(&entry.repeat(1_000)), short(&[0xfe; 255])].concat();
        let payload = payload(HEADERS | CORRELATION_ID, &all);
        let (properties, problem) = rewritten(&payload);
        assert_eq!(properties.headers().as_ref().unwrap().inner().len(), 1);
        assert!(problem.starts_with("the headers are left out"), "{problem}");
        assert!(problem.ends_with("; and more") && problem.len() < 1_200, "{problem}");
        let id = properties.correlation_id().as_ref().unwrap().as_str();
        assert_eq!(id, &"\\xfe".repeat(64)[..255]);
    }

    #[test]
    fn properties_of_no_known_form_are_left_out() {
        for broken in [
            payload(CORRELATION_ID, &[9]),
            payload(0, b"more"),
            payload(HEADERS, &long(&[short(b"k"), vec![b'?']].concat())),
            payload(HEADERS, &[0xff; 9]),
            payload(0, &[])[..FIXED + 1].to_vec(),
        ] {
            let (_, problem) = rewritten(&broken);
            assert!(problem.contains("not of the form"), "{problem}");
        }
    }
}
