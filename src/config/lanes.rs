//! `amqp.jobs_queue`: one queue of jobs, or several that are served by weight.

use serde::Deserialize;

use angler_amqp::run_queues::{MAX_BASE_BYTES, base};

/// The largest weight.
const MAX_WEIGHT: u32 = 1000;
/// The most queues: a worker has a connection for each.
const MAX_LANES: usize = 8;

/// A queue of jobs, and its share beside the others when all of them have jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lane {
    /// The queue's name.
    pub queue: String,
    /// Images of it are taken in this proportion to those of the others, 1 to 1000.
    pub weight: u32,
}

/// The queues of jobs that a worker serves: at least one, none twice.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "OneOrMore")]
pub struct Lanes(Vec<Lane>);

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl Lanes {
    /// A single queue.
    pub fn one(queue: String) -> Self {
        Self(vec![Lane { queue, weight: 1 }])
    }

    /// The one that jobs go to unless another is named, and that the fleet's other queues are named
    /// after.
    pub fn first(&self) -> &Lane {
        &self.0[0] // There is at least one.
    }

    /// All, the first one first.
    pub fn iter(&self) -> std::slice::Iter<'_, Lane> {
        self.0.iter()
    }

    /// Their names, for a sentence.
    pub fn names(&self) -> String {
        self.0.iter().map(|lane| lane.queue.as_str()).collect::<Vec<_>>().join(", ")
    }
}

impl<'a> IntoIterator for &'a Lanes {
    type Item = &'a Lane;
    type IntoIter = std::slice::Iter<'a, Lane>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl TryFrom<OneOrMore> for Lanes {
    type Error = String;

    fn try_from(given: OneOrMore) -> Result<Self, String> {
        let texts = match given {
            OneOrMore::One(text) => text.split(',').map(str::to_owned).collect(),
            OneOrMore::More(texts) => texts,
        };
        let lanes: Vec<Lane> = texts.iter().map(|text| lane(text)).collect::<Result<_, _>>()?;
        if !(1..=MAX_LANES).contains(&lanes.len()) {
            return Err(format!("amqp.jobs_queue: 1 to {MAX_LANES} queues, not {}", lanes.len()));
        }
        for (at, lane) in lanes.iter().enumerate() {
            if lanes[..at].iter().any(|other| other.queue == lane.queue) {
                return Err(format!("amqp.jobs_queue names {} twice", lane.queue));
            }
        }
        Ok(Self(lanes))
    }
}

/// `NAME` or `NAME:WEIGHT`.
fn lane(text: &str) -> Result<Lane, String> {
    let text = text.trim();
    let weighted = text
        .rsplit_once(':')
        .filter(|(_, weight)| !weight.is_empty() && weight.bytes().all(|b| b.is_ascii_digit()));
    let (queue, weight) = match weighted {
        None => (text, 1),
        Some((queue, weight)) => {
            let weight = weight.parse().ok().filter(|w| (1..=MAX_WEIGHT).contains(w));
            let wrong =
                || format!("amqp.jobs_queue: the weight of {text} must be 1 to {MAX_WEIGHT}");
            (queue, weight.ok_or_else(wrong)?)
        }
    };
    if queue.is_empty() {
        return Err("amqp.jobs_queue: a queue must have a name".to_owned());
    }
    let bytes = base(queue).len();
    if bytes > MAX_BASE_BYTES {
        return Err(format!(
            "amqp.jobs_queue: {queue} has {bytes} bytes, without .jobs, and may have {MAX_BASE_BYTES}: retry queues, runs' queues \
             and others are named after it"
        ));
    }
    Ok(Lane { queue: queue.to_owned(), weight })
}

#[cfg(test)]
mod tests {
    use super::*;
    use angler_amqp::run_queues::RunQueues;
    use angler_runs::mark;

    fn parsed(json: &str) -> Result<Vec<(String, u32)>, String> {
        let lanes: Lanes = serde_json::from_str(json).map_err(|e| e.to_string())?;
        Ok(lanes.iter().map(|lane| (lane.queue.clone(), lane.weight)).collect())
    }

    #[test]
    fn a_queue_is_a_name_and_perhaps_a_weight() {
        let lane = |name: &str, weight| (name.to_owned(), weight);
        assert_eq!(parsed(r#""angler.jobs""#).unwrap(), [lane("angler.jobs", 1)]);
        assert_eq!(parsed(r#""a:8, b""#).unwrap(), [lane("a", 8), lane("b", 1)]);
        assert_eq!(parsed(r#"["a", "b:3"]"#).unwrap(), [lane("a", 1), lane("b", 3)]);
        // Colons are allowed in names.
        assert_eq!(parsed(r#""eu:jobs""#).unwrap(), [lane("eu:jobs", 1)]);
    }

    #[test]
    fn the_names_of_all_queues_around_one_fit() {
        for (longest, too_long) in [
            ("q".repeat(99), "q".repeat(100)),
            ("ä".repeat(49) + ".jobs", "ä".repeat(50) + ".jobs"),
        ] {
            assert_eq!(parsed(&format!("{longest:?}")).unwrap(), [(longest.clone(), 1)]);
            let queues = RunQueues::new(&longest, &"r".repeat(128), &mark::new_nonce());
            assert!(queues.cancelled.len() <= 255, "{}", queues.cancelled.len());
            let error = parsed(&format!("{too_long:?}")).unwrap_err();
            assert!(error.contains("100 bytes, without .jobs, and may have 99"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_served_is_refused_with_the_reason() {
        for (json, words) in [
            (r#""""#, "must have a name"),
            (r#"["a", ""]"#, "must have a name"),
            (r#"":3""#, "must have a name"),
            ("[]", "1 to 8 queues"),
            (r#""a,b,c,d,e,f,g,h,i""#, "1 to 8 queues"),
            (r#""a:2,a""#, "names a twice"),
            (r#""a:0""#, "weight of a:0"),
            (r#""a:1001""#, "weight of a:1001"),
        ] {
            let error = parsed(json).unwrap_err();
            assert!(error.contains(words), "{json}: {error}");
        }
    }
}
