//! What a back end made of versions of class vectors, kept while somebody serves them.
//!
//! The copies are bounded in bytes, and none keeps its version alive: a version that is dropped
//! takes its copy along at the next look. While two versions are served in turn, during a swap or
//! by jobs that pin one, neither pushes the other out: what does not fit is not prepared, unless
//! others have not been asked for lately.

use std::sync::{Arc, Weak};

use crate::classes::ClassVectors;

/// Looks after which a copy that was not asked for may go. As many batches are seconds on a CPU
/// and less on a GPU: longer than versions alternate in a swap, and a copy is soon made again.
const STALE: u64 = 64;

/// Copies of versions, of any kind.
pub(super) struct Prepared<T> {
    /// In bytes.
    budget: usize,
    looks: u64,
    entries: Vec<Entry<T>>,
}

struct Entry<T> {
    /// It keeps the version's address from being given to another.
    version: Weak<ClassVectors>,
    bytes: usize,
    last: u64,
    /// None: this version cannot be prepared, which has been said.
    copy: Option<T>,
}

impl<T> Prepared<T> {
    pub fn new(budget: usize) -> Self {
        Self { budget, looks: 0, entries: Vec::new() }
    }

    /// The copy of a version, which takes `bytes`; made now if there is none. None if it cannot be
    /// made, or does not fit. Why not is logged once a version.
    pub fn get(
        &mut self,
        classes: &Arc<ClassVectors>,
        bytes: usize,
        make: impl FnOnce() -> Result<T, String>,
    ) -> Option<&T> {
        self.looks += 1;
        self.entries.retain(|entry| entry.version.strong_count() > 0);
        let known = |entry: &Entry<T>| std::ptr::eq(entry.version.as_ptr(), Arc::as_ptr(classes));
        let at = match self.entries.iter().position(known) {
            Some(at) => at,
            None => self.insert(classes, bytes, make)?,
        };
        self.entries[at].last = self.looks;
        self.entries[at].copy.as_ref()
    }

    /// Where the new entry stands, if there is room for it.
    fn insert(
        &mut self,
        classes: &Arc<ClassVectors>,
        bytes: usize,
        make: impl FnOnce() -> Result<T, String>,
    ) -> Option<usize> {
        let copy = if bytes > self.budget {
            Err(format!("{bytes} bytes are more than embedder.graph_bytes = {}", self.budget))
        } else {
            self.make_room(bytes)?;
            make()
        };
        if let Err(reason) = &copy {
            tracing::warn!(classes = classes.id(), "scored on the host: {reason}");
        }
        self.entries.push(Entry {
            version: Arc::downgrade(classes),
            bytes: if copy.is_ok() { bytes } else { 0 },
            last: self.looks,
            copy: copy.ok(),
        });
        Some(self.entries.len() - 1)
    }

    /// Drops copies that nobody asked for lately, the oldest first, if that makes enough room.
    fn make_room(&mut self, bytes: usize) -> Option<()> {
        let looks = self.looks;
        let stale = |entry: &Entry<T>| entry.copy.is_some() && looks - entry.last >= STALE;
        let sum = |entries: &[Entry<T>], count: &dyn Fn(&Entry<T>) -> bool| -> usize {
            entries.iter().filter(|entry| count(entry)).map(|entry| entry.bytes).sum()
        };
        if sum(&self.entries, &|entry| !stale(entry)) + bytes > self.budget {
            return None;
        }
        while sum(&self.entries, &|_| true) + bytes > self.budget {
            let oldest = (0..self.entries.len())
                .filter(|at| stale(&self.entries[*at]))
                .min_by_key(|at| self.entries[*at].last)?;
            self.entries.swap_remove(oldest);
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classes::Contents;
    use ndarray::array;

    fn version(name: &str) -> Arc<ClassVectors> {
        let contents = Contents::new(vec!["a".into()], array![[1.0]], "m@0");
        Arc::new(ClassVectors::new(("set", name), contents).unwrap())
    }

    /// Looks a version up; yields its copy and whether it was made now.
    fn look(
        prepared: &mut Prepared<u32>,
        classes: &Arc<ClassVectors>,
        bytes: usize,
    ) -> Option<bool> {
        let mut made = false;
        let copy = prepared.get(classes, bytes, || {
            made = true;
            Ok(7)
        });
        copy.map(|copy| {
            assert_eq!(*copy, 7);
            made
        })
    }

    #[test]
    fn a_copy_is_made_once_and_goes_with_its_version() {
        let mut prepared = Prepared::new(100);
        let (a, b) = (version("a"), version("b"));
        assert_eq!(look(&mut prepared, &a, 60), Some(true));
        assert_eq!(look(&mut prepared, &a, 60), Some(false));
        // The same contents under another pointer are another version.
        assert_eq!(look(&mut prepared, &b, 60), None, "both do not fit");
        drop(a);
        assert_eq!(look(&mut prepared, &b, 60), Some(true));
        assert_eq!(prepared.entries.len(), 1);
    }

    #[test]
    fn versions_that_are_served_in_turn_do_not_push_each_other_out() {
        let mut prepared = Prepared::new(100);
        let (a, b) = (version("a"), version("b"));
        assert_eq!(look(&mut prepared, &a, 60), Some(true));
        for _ in 0..3 * STALE {
            assert_eq!(look(&mut prepared, &b, 60), None);
            assert_eq!(look(&mut prepared, &a, 60), Some(false));
        }
        // Nobody asks for the first any more.
        let waited = (0..).find(|_| look(&mut prepared, &b, 60).is_some());
        assert_eq!(waited, Some(STALE - 1));
        assert_eq!(look(&mut prepared, &a, 60), None);
    }

    #[test]
    fn only_as_many_go_as_must_the_oldest_first() {
        let mut prepared = Prepared::new(100);
        let [a, b, c, fresh] = ["a", "b", "c", "fresh"].map(version);
        for classes in [&a, &b, &c] {
            assert_eq!(look(&mut prepared, classes, 30), Some(true));
        }
        while prepared.looks < 3 + STALE {
            look(&mut prepared, &fresh, 5);
        }
        assert_eq!(look(&mut prepared, &version("d"), 20), Some(true));
        let left: Vec<usize> = [&a, &b, &c]
            .map(|c| prepared.entries.iter().filter(|e| e.version.as_ptr() == Arc::as_ptr(c)))
            .map(Iterator::count)
            .to_vec();
        assert_eq!(left, [0, 1, 1]);
    }

    #[test]
    fn what_cannot_be_prepared_is_not_tried_again() {
        let mut prepared = Prepared::<u32>::new(100);
        let (large, refused, other) = (version("large"), version("refused"), version("other"));
        assert!(prepared.get(&large, 101, || panic!("it does not fit")).is_none());
        assert!(prepared.get(&refused, 50, || Err("no memory on the device".into())).is_none());
        assert!(prepared.get(&refused, 50, || panic!("it was refused")).is_none());
        assert_eq!(look(&mut prepared, &other, 100), Some(true), "neither takes memory");
    }
}
