//! The last errors, for people: a few, each cut to a bounded length.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde::Serialize;

use angler_wire::text::cut;

/// How many are kept.
const KEPT: usize = 20;
/// The most characters of each text that are kept; the result has all of it.
const LONGEST: usize = 400;

/// The last errors of images and jobs.
#[derive(Default)]
pub struct Recent(Mutex<VecDeque<Entry>>);

struct Entry {
    at: SystemTime,
    job: String,
    image: Option<String>,
    code: &'static str,
    message: String,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RecentError {
    /// When, RFC 3339.
    pub at: String,
    /// The job's id.
    pub job: String,
    /// The image's URI; none: the whole job failed.
    pub image: Option<String>,
    /// The code, as in the result.
    pub code: &'static str,
    /// What was wrong.
    pub message: String,
}

impl Recent {
    /// Takes note of one; the oldest is forgotten.
    pub(super) fn add(&self, job: &str, image: Option<&str>, code: &'static str, message: &str) {
        let entry = Entry {
            at: SystemTime::now(),
            job: cut(job, LONGEST),
            image: image.map(|uri| cut(uri, LONGEST)),
            code,
            message: cut(message, LONGEST),
        };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(entry);
    }

    /// All that are kept.
    pub(super) fn newest_first(&self) -> Vec<RecentError> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = kept.iter().rev().map(|entry| RecentError {
            at: humantime::format_rfc3339_millis(entry.at).to_string(),
            job: entry.job.clone(),
            image: entry.image.clone(),
            code: entry.code,
            message: entry.message.clone(),
        });
        shown.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept_and_each_is_bounded() {
        let recent = Recent::default();
        for number in 0..50 {
            recent.add(&number.to_string(), None, "internal", &"ü".repeat(1_000));
        }
        recent.add("last", Some("s3://b/k"), "not_found", "no such key");
        let errors = recent.newest_first();
        assert_eq!(errors.len(), KEPT);
        assert_eq!((errors[0].job.as_str(), errors[19].job.as_str()), ("last", "31"));
        assert_eq!(errors[0].image.as_deref(), Some("s3://b/k"));
        assert_eq!(errors[1].message.chars().count(), LONGEST + 1);
        assert!(errors[0].at.ends_with('Z'), "{}", errors[0].at);
    }
}
