//! What a back end made of versions of class vectors, kept while somebody serves them.
//!
//! The copies are bounded in bytes, and none keeps its version alive: a version that is dropped
//! takes its copy along at the next look. While two versions are served in turn, during a swap or
//! by jobs that pin one, neither pushes the other out: what does not fit is not prepared, unless
//! others have not been asked for lately.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use angler_vectors::ClassVectors;
use angler_wire::error::Reason;
use angler_wire::text::chain;

/// Looks after which a copy that was not asked for may go. As many batches are seconds on a CPU
/// and less on a GPU: longer than versions alternate in a swap, and a copy is soon made again.
const STALE: u64 = 64;

/// Copies of versions, of any kind that is cheap to clone. A copy is made outside of the lock:
/// while a large version travels, batches of others go on.
pub(super) struct Prepared<T> {
    state: Mutex<State<T>>,
}

struct State<T> {
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
    copy: Kept<T>,
}

enum Kept<T> {
    /// Somebody makes it.
    Coming,
    Made(T),
    /// This version cannot be prepared, which has been said.
    Refused,
}

impl<T: Clone> Prepared<T> {
    pub fn new(budget: usize) -> Self {
        Self { state: Mutex::new(State { budget, looks: 0, entries: Vec::new() }) }
    }

    /// The copy of a version, which takes `bytes`; made now if there is none. None if it cannot be
    /// made, does not fit, or is being made by another thread. Why not is logged once a version.
    pub fn get(
        &self,
        classes: &Arc<ClassVectors>,
        bytes: usize,
        make: impl FnOnce() -> Result<T, Reason>,
    ) -> Option<T> {
        let refusal = {
            let mut state = self.lock();
            if let Some(entry) = state.find(classes) {
                return match &entry.copy {
                    Kept::Made(copy) => Some(copy.clone()),
                    Kept::Coming | Kept::Refused => None,
                };
            }
            let budget = state.budget;
            let fits = bytes <= budget;
            if fits {
                state.make_room(bytes)?;
            }
            state.insert(classes, if fits { bytes } else { 0 });
            (!fits).then(|| format!("{bytes} bytes are more than embedder.graph_bytes = {budget}"))
        };
        let made = match refusal {
            Some(reason) => Err(reason.into()),
            None => make(),
        };
        let mut state = self.lock();
        // It may be gone by now, with its version.
        let entry = state.entries.iter_mut().find(|entry| entry.is_of(classes));
        match made {
            Ok(copy) => {
                if let Some(entry) = entry {
                    entry.copy = Kept::Made(copy.clone());
                }
                Some(copy)
            }
            Err(reason) => {
                let reason = chain(&reason);
                tracing::warn!(classes = classes.id(), "scored on the host: {reason}");
                if let Some(entry) = entry {
                    (entry.bytes, entry.copy) = (0, Kept::Refused);
                }
                None
            }
        }
    }

    /// Nothing that leaves it in between can panic.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Entry<T> {
    fn is_of(&self, classes: &Arc<ClassVectors>) -> bool {
        std::ptr::eq(self.version.as_ptr(), Arc::as_ptr(classes))
    }
}

impl<T> State<T> {
    /// Looks for a version, and notes that it was asked for.
    fn find(&mut self, classes: &Arc<ClassVectors>) -> Option<&Entry<T>> {
        self.looks += 1;
        let looks = self.looks;
        self.entries.retain(|entry| entry.version.strong_count() > 0);
        let entry = self.entries.iter_mut().find(|entry| entry.is_of(classes))?;
        entry.last = looks;
        Some(entry)
    }

    fn insert(&mut self, classes: &Arc<ClassVectors>, bytes: usize) {
        let (version, last) = (Arc::downgrade(classes), self.looks);
        self.entries.push(Entry { version, bytes, last, copy: Kept::Coming });
    }

    /// Drops copies that nobody asked for lately, the oldest first, if that makes enough room.
    fn make_room(&mut self, bytes: usize) -> Option<()> {
        let looks = self.looks;
        let stale =
            |entry: &Entry<T>| matches!(entry.copy, Kept::Made(_)) && looks - entry.last >= STALE;
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
    use ndarray::array;

    use angler_vectors::Contents;

    use super::*;

    fn version(name: &str) -> Arc<ClassVectors> {
        let contents = Contents::new(vec!["a".into()], array![[1.0]], "m@0");
        Arc::new(ClassVectors::new(("set", name), contents).unwrap())
    }

    /// Looks a version up; yields its copy and whether it was made now.
    fn look(prepared: &Prepared<u32>, classes: &Arc<ClassVectors>, bytes: usize) -> Option<bool> {
        let mut made = false;
        let copy = prepared.get(classes, bytes, || {
            made = true;
            Ok(7)
        });
        copy.map(|copy| {
            assert_eq!(copy, 7);
            made
        })
    }

    #[test]
    fn a_copy_is_made_once_and_goes_with_its_version() {
        let prepared = Prepared::new(100);
        let (a, b) = (version("a"), version("b"));
        assert_eq!(look(&prepared, &a, 60), Some(true));
        assert_eq!(look(&prepared, &a, 60), Some(false));
        // The same contents under another pointer are another version.
        assert_eq!(look(&prepared, &b, 60), None, "both do not fit");
        drop(a);
        assert_eq!(look(&prepared, &b, 60), Some(true));
        assert_eq!(prepared.lock().entries.len(), 1);
    }

    #[test]
    fn versions_that_are_served_in_turn_do_not_push_each_other_out() {
        let prepared = Prepared::new(100);
        let (a, b) = (version("a"), version("b"));
        assert_eq!(look(&prepared, &a, 60), Some(true));
        for _ in 0..3 * STALE {
            assert_eq!(look(&prepared, &b, 60), None);
            assert_eq!(look(&prepared, &a, 60), Some(false));
        }
        // Nobody asks for the first any more.
        let waited = (0..).find(|_| look(&prepared, &b, 60).is_some());
        assert_eq!(waited, Some(STALE - 1));
        assert_eq!(look(&prepared, &a, 60), None);
    }

    #[test]
    fn only_as_many_go_as_must_the_oldest_first() {
        let prepared = Prepared::new(100);
        let [a, b, c, fresh] = ["a", "b", "c", "fresh"].map(version);
        for classes in [&a, &b, &c] {
            assert_eq!(look(&prepared, classes, 30), Some(true));
        }
        while prepared.lock().looks < 3 + STALE {
            look(&prepared, &fresh, 5);
        }
        assert_eq!(look(&prepared, &version("d"), 20), Some(true));
        let left: Vec<usize> = [&a, &b, &c]
            .map(|c| prepared.lock().entries.iter().filter(|e| e.is_of(c)).count())
            .to_vec();
        assert_eq!(left, [0, 1, 1]);
    }

    #[test]
    fn what_cannot_be_prepared_is_not_tried_again() {
        let prepared = Prepared::<u32>::new(100);
        let (large, refused, other) = (version("large"), version("refused"), version("other"));
        assert!(prepared.get(&large, 101, || panic!("it does not fit")).is_none());
        assert!(prepared.get(&refused, 50, || Err("no memory on the device".into())).is_none());
        assert!(prepared.get(&refused, 50, || panic!("it was refused")).is_none());
        assert_eq!(look(&prepared, &other, 100), Some(true), "neither takes memory");
    }
    #[test]
    fn nobody_waits_for_a_copy_that_another_thread_makes() {
        let prepared = Prepared::new(100);
        let (large, other) = (version("large"), version("other"));
        let copy = prepared.get(&large, 60, || {
            assert_eq!(look(&prepared, &large, 60), None, "it is on its way");
            assert_eq!(look(&prepared, &other, 30), Some(true), "others come and go meanwhile");
            assert_eq!(look(&prepared, &version("third"), 30), None, "its room is taken");
            Ok(7)
        });
        assert_eq!(copy, Some(7));
        assert_eq!(look(&prepared, &large, 60), Some(false));
    }
}
