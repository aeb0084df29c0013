//! The threshold that holds a chosen rate of false positives: open-set identification.
//!
//! Deciding which class an image shows, or none, is a search (1:N) in a gallery that may not hold
//! what is searched for. The false positive identification rate, FPIR, is the share of *non-mated*
//! searches (nothing of theirs is in the gallery) that return a candidate at or above the threshold
//! (ISO/IEC 19795-1; NIST FRVT 1:N, Grother et al., NISTIR 8271).
//!
//! Every image doubles as a non-mated search: with its own class taken out of the set, its best
//! score is one that should have been refused. A stranger, an image of no class of the set, is one
//! as it is.

use serde::Serialize;

use super::statistics::Rate;

/// The scores that a threshold is chosen by; a few bytes an image.
#[derive(Debug, Clone, Default)]
pub struct Scores {
    /// Every image's best score among the classes that are not its own.
    impostor: Vec<f32>,
    /// Those of them that belong to strangers.
    strangers: Vec<f32>,
    /// The best score of each known image whose best class is right.
    right: Vec<f32>,
    /// Images whose class is in the set.
    known: u64,
}

/// A threshold, and what it does to the images it was found with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Calibration {
    /// The rate of false positives asked for.
    pub rate: f64,
    /// The smallest threshold that keeps it. A score at or above it is accepted.
    pub threshold: f32,
    /// Non-mated searches that were accepted: FPIR.
    pub false_positives: Rate,
    /// The same over strangers alone; of 0 if there are none.
    pub false_positives_strangers: Rate,
    /// Known images that are right and accepted.
    pub right_and_accepted: Rate,
}

/// Why there is no threshold.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CalibrationError {
    /// Not a rate.
    #[error("the rate of false positives must lie between 0 and 1, it is {0}")]
    NotARate(f64),
    /// Fewer than one false positive is allowed, so any threshold would be a guess.
    #[error(
        "a rate of {rate} cannot be found with {images} images: it takes at least {needed}, of which one may be accepted"
    )]
    TooFew {
        /// The rate asked for.
        rate: f64,
        /// Non-mated searches there are.
        images: u64,
        /// How many it takes.
        needed: u64,
    },
    /// Too many images match a class that is not theirs perfectly.
    #[error(
        "no threshold keeps a rate of {rate}: {perfect} of {images} images have a score of 1 with a class that is not theirs; look for the same images under several classes"
    )]
    Unreachable {
        /// The rate asked for.
        rate: f64,
        /// Images with a perfect impostor score.
        perfect: u64,
        /// Non-mated searches there are.
        images: u64,
    },
}

/// The most of `n` searches that may be accepted. In decimal thinking: 0.29 · 100 is 29, not the
/// 28.999… that binary fractions make of it.
fn allowed(rate: f64, n: usize) -> usize {
    (rate * n as f64 * (1.0 + 4.0 * f64::EPSILON)).floor() as usize
}

/// The fewest searches of which one may be accepted at this rate, which lies between 0 and 1.
pub fn searches_for_one(rate: f64) -> u64 {
    let about = (1.0 / rate).round().max(1.0) as usize;
    let needed = [about.saturating_sub(1), about].into_iter().find(|n| allowed(rate, *n) > 0);
    needed.unwrap_or(about.saturating_add(1)) as u64
}

impl Scores {
    /// Adds a known image: its best score if its best class is right, and its impostor score if the
    /// set has another class.
    pub fn known(&mut self, right: Option<f32>, impostor: Option<f32>) {
        self.known += 1;
        self.right.extend(right);
        self.impostor.extend(impostor);
    }

    /// Adds an image of no class of the set.
    pub fn stranger(&mut self, best: f32) {
        self.strangers.push(best);
        self.impostor.push(best);
    }

    /// The smallest threshold at which at most ⌊rate · n⌋ of the n impostor scores are accepted:
    /// just above the (⌊rate · n⌋ + 1)-th largest.
    ///
    /// # Errors
    /// [`CalibrationError`].
    pub fn calibrate(&self, rate: f64) -> Result<Calibration, CalibrationError> {
        if !(rate > 0.0 && rate < 1.0) {
            return Err(CalibrationError::NotARate(rate));
        }
        let n = self.impostor.len();
        let allowed = allowed(rate, n).min(n.saturating_sub(1));
        if allowed == 0 {
            let needed = searches_for_one(rate);
            return Err(CalibrationError::TooFew { rate, images: n as u64, needed });
        }
        let mut scores = self.impostor.clone();
        let (_, refused, _) = scores.select_nth_unstable_by(allowed, |a, b| b.total_cmp(a));
        let threshold = refused.next_up();
        if threshold > 1.0 {
            return Err(CalibrationError::Unreachable {
                rate,
                perfect: at_or_above(&self.impostor, 1.0).count,
                images: n as u64,
            });
        }
        Ok(Calibration {
            rate,
            threshold,
            false_positives: at_or_above(&self.impostor, threshold),
            false_positives_strangers: at_or_above(&self.strangers, threshold),
            right_and_accepted: Rate::new(at_or_above(&self.right, threshold).count, self.known),
        })
    }
}

fn at_or_above(scores: &[f32], threshold: f32) -> Rate {
    let count = scores.iter().filter(|score| **score >= threshold).count();
    Rate::new(count as u64, scores.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strangers(scores: impl IntoIterator<Item = f32>) -> Scores {
        let mut all = Scores::default();
        scores.into_iter().for_each(|score| all.stranger(score));
        all
    }

    #[test]
    fn the_threshold_is_the_smallest_that_keeps_the_rate() {
        let scores = strangers((0..100).map(|i| i as f32 / 100.0));
        for (rate, allowed) in [(0.01, 1), (0.07, 7), (0.29, 29), (0.999, 99), (0.015, 1)] {
            let found = scores.calibrate(rate).unwrap();
            assert_eq!(found.false_positives, Rate::new(allowed, 100), "{rate}");
            // One step lower and there is one more.
            let lower = at_or_above(&scores.impostor, found.threshold.next_down());
            assert_eq!(lower.count, allowed + 1, "{rate}");
        }
    }

    #[test]
    fn equal_scores_are_accepted_together_or_not_at_all() {
        // Two may be accepted, but the second to the fourth are equal.
        let scores = strangers([0.9, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]);
        let found = scores.calibrate(0.2).unwrap();
        assert_eq!(found.false_positives.count, 1);
        assert_eq!(found.threshold, 0.5_f32.next_up());
        let negative = strangers([-0.2, -0.5, -0.5]).calibrate(0.34).unwrap();
        assert!(-0.5 < negative.threshold && negative.threshold < -0.4999);
    }

    #[test]
    fn known_images_are_counted_among_the_accepted_and_as_searches() {
        let mut scores = strangers([0.3, 0.1]);
        scores.known(Some(0.8), Some(0.6));
        scores.known(Some(0.55), Some(0.2));
        scores.known(None, Some(0.7));
        scores.known(Some(0.9), None); // the set's only class
        let found = scores.calibrate(0.2).unwrap();
        assert_eq!(found.threshold, 0.6_f32.next_up());
        assert_eq!(found.false_positives, Rate::new(1, 5));
        assert_eq!(found.false_positives_strangers, Rate::new(0, 2));
        assert_eq!(found.right_and_accepted, Rate::new(2, 4));
    }

    #[test]
    fn what_cannot_be_calibrated_says_what_it_takes() {
        let few = strangers((0..99).map(|i| i as f32 / 100.0));
        let error = few.calibrate(0.01).unwrap_err();
        assert_eq!(error, CalibrationError::TooFew { rate: 0.01, images: 99, needed: 100 });
        assert!(error.to_string().contains("at least 100"), "{error}");
        let error = Scores::default().calibrate(0.001).unwrap_err();
        assert_eq!(error, CalibrationError::TooFew { rate: 0.001, images: 0, needed: 1000 });
        for (rate, needed) in
            [(0.5, 2), (0.07, 15), (0.003, 334), (0.9, 2), (1e-12, 10_u64.pow(12))]
        {
            assert_eq!(searches_for_one(rate), needed, "{rate}");
        }
        for rate in [0.0, 1.0, -0.1, f64::NAN] {
            assert!(matches!(few.calibrate(rate), Err(CalibrationError::NotARate(_))), "{rate}");
        }
        let same = strangers([1.0, 1.0, 0.2]).calibrate(0.34).unwrap_err();
        assert_eq!(same, CalibrationError::Unreachable { rate: 0.34, perfect: 2, images: 3 });
    }

    /// What calibration promises: the rate holds for images that it has not seen.
    #[test]
    fn the_rate_holds_on_images_held_back() {
        for seed in 0..8 {
            let mut random = fastrand::Rng::with_seed(seed);
            // Sums of uniforms: about normal, a tail to speak of, and no two classes of scores.
            let mut draw = |centre: f32| {
                let noise: f32 = (0..6).map(|_| random.f32() - 0.5).sum();
                (centre + 0.12 * noise).clamp(-1.0, 1.0)
            };
            let n = 20_000;
            let mut half = |_: u32| {
                let mut scores = Scores::default();
                for i in 0..n {
                    match i % 4 {
                        0 => scores.stranger(draw(0.35)),
                        _ => scores.known(Some(draw(0.7)), Some(draw(0.4))),
                    }
                }
                scores
            };
            let (found_with, held_back) = (half(0), half(1));
            for rate in [0.001, 0.01, 0.1] {
                let threshold = found_with.calibrate(rate).unwrap().threshold;
                let seen = at_or_above(&held_back.impostor, threshold).share().unwrap();
                // The threshold is a sample quantile, so its own error counts as well: two draws.
                let sigma = (2.0 * rate * (1.0 - rate) / f64::from(n)).sqrt();
                assert!((seen - rate).abs() <= 4.0 * sigma, "seed {seed}: {seen} for {rate}");
            }
        }
    }
}
