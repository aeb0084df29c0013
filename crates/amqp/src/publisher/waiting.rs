//! Which messages for the worker's own queues wait for their confirm, and since when.
//!
//! Such a message is never dropped, so it may wait for hours: for a queue that is full, one that is
//! missing and cannot be declared, or a broker that cannot be reached. The worker must then say what
//! it waits for.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long a confirm may take before it is worth a word. A change of a queue's leader takes less.
const NOTABLE: Duration = Duration::from_secs(5);

/// The messages that wait, in the order in which they came.
#[derive(Default)]
pub(super) struct Waiting(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    count: u64,
    waiting: BTreeMap<u64, Entry>,
}

struct Entry {
    queue: String,
    since: Instant,
    reason: Option<String>,
}

/// One message that waits until it is dropped.
pub(super) struct Wait<'a> {
    all: &'a Waiting,
    number: u64,
}

impl Waiting {
    /// Adds a message for `queue`.
    pub fn begin(&self, queue: &str) -> Wait<'_> {
        let mut entries = self.lock();
        entries.count += 1;
        let number = entries.count;
        let entry = Entry { queue: queue.to_owned(), since: Instant::now(), reason: None };
        entries.waiting.insert(number, entry);
        Wait { all: self, number }
    }

    /// Describes the message that has waited longest, if that is long.
    ///
    /// * `otherwise`: the reason, if the broker has not refused the message itself.
    pub fn longest(&self, otherwise: Option<&str>) -> Option<String> {
        let entries = self.lock();
        let (_, Entry { queue, since, reason }) = entries.waiting.first_key_value()?;
        let waited = since.elapsed();
        let reason = reason.as_deref().or(otherwise).unwrap_or("the broker has not answered");
        (waited >= NOTABLE).then(|| {
            format!(
                "a message for {queue} has not been confirmed for {} s: {reason}",
                waited.as_secs()
            )
        })
    }

    /// Nothing panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wait<'_> {
    /// Notes why the message was not confirmed the last time.
    pub fn because(&self, reason: &str) {
        if let Some(entry) = self.all.lock().waiting.get_mut(&self.number) {
            entry.reason = Some(reason.to_owned());
        }
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.all.lock().waiting.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_longest_wait_is_told_once_it_is_long() {
        let all = Waiting::default();
        let first = all.begin("results");
        tokio::time::advance(NOTABLE - Duration::from_millis(1)).await;
        let second = all.begin("dead");
        assert_eq!(all.longest(None), None);
        tokio::time::advance(Duration::from_millis(1001)).await;
        let told = all.longest(Some("connection refused")).unwrap();
        assert!(told.contains("results") && told.ends_with("6 s: connection refused"), "{told}");
        first.because("nack");
        assert!(all.longest(Some("connection refused")).unwrap().ends_with(": nack"));
        drop(first);
        assert_eq!(all.longest(None), None);
        tokio::time::advance(NOTABLE).await;
        assert!(all.longest(None).unwrap().contains("dead"));
        drop(second);
        assert_eq!(all.longest(None), None);
    }
}
