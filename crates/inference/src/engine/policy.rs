//! When a batch closes. It knows nothing of what a batch holds, and has no clock.
//!
//! While the engine is busy a batch keeps filling; nothing is gained by closing it early. When the
//! engine is idle, the oldest image waits at most `linger` for company.

use std::time::Duration;

use angler_metrics::CloseReason;

/// When batches close.
#[derive(Debug, Clone, Copy)]
pub struct BatchPolicy {
    /// The most images in a batch.
    pub max_batch: usize,
    /// How long the oldest image of a batch waits for others while the engine is idle.
    pub linger: Duration,
}

/// A batch that is forming, as the policy sees it.
#[derive(Debug, Clone, Copy)]
pub struct Forming {
    /// Images so far.
    pub images: usize,
    /// How long the oldest has waited.
    pub waited: Duration,
    /// Whether an embedder has nothing to do and nothing is queued for it.
    pub idle: bool,
    /// Whether no more images are to come.
    pub draining: bool,
}

impl BatchPolicy {
    /// Whether the batch closes now, and why.
    pub fn closes(&self, forming: Forming) -> Option<CloseReason> {
        match forming {
            Forming { images: 0, .. } => None,
            Forming { images, .. } if images >= self.max_batch => Some(CloseReason::Full),
            Forming { idle: false, .. } => None,
            Forming { draining: true, .. } => Some(CloseReason::Drain),
            Forming { waited, .. } => (waited >= self.linger).then_some(CloseReason::Linger),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: BatchPolicy = BatchPolicy { max_batch: 8, linger: Duration::from_millis(5) };
    const FORMING: Forming =
        Forming { images: 3, waited: Duration::from_millis(1), idle: true, draining: false };

    #[test]
    fn a_batch_closes_when_full_even_if_the_engine_is_busy() {
        let full = Forming { images: 8, idle: false, ..FORMING };
        assert_eq!(POLICY.closes(full), Some(CloseReason::Full));
    }

    #[test]
    fn while_the_engine_is_busy_a_batch_keeps_filling() {
        let old = Forming { waited: Duration::from_secs(9), idle: false, ..FORMING };
        assert_eq!(POLICY.closes(old), None);
        assert_eq!(POLICY.closes(Forming { draining: true, ..old }), None);
    }

    #[test]
    fn an_idle_engine_waits_for_company_only_as_long_as_the_linger() {
        assert_eq!(POLICY.closes(FORMING), None);
        let waited = Forming { waited: POLICY.linger, ..FORMING };
        assert_eq!(POLICY.closes(waited), Some(CloseReason::Linger));
    }

    #[test]
    fn a_drain_does_not_linger_and_closes_nothing_empty() {
        let drain = Forming { draining: true, ..FORMING };
        assert_eq!(POLICY.closes(drain), Some(CloseReason::Drain));
        assert_eq!(POLICY.closes(Forming { images: 0, ..drain }), None);
    }
}
