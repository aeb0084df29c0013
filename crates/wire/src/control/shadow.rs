//! What workers count of a shadow version, and what a command adds up.

use serde::{Deserialize, Serialize};

/// What a worker's shadow version counted, or several workers' together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ShadowReport {
    /// `set@version` that was tried.
    pub candidate: String,
    /// Whether it is loaded; the worker's log says why not.
    pub loaded: bool,
    /// `set@version` that was served meanwhile; empty: no image yet.
    pub served: String,
    /// Images that were scored against both.
    pub images: u64,
    /// Images whose label would be another, unknown counted as a label.
    pub flips: u64,
    /// Of these, images that would become unknown.
    pub became_unknown: u64,
    /// Of these, images that are unknown now.
    pub became_known: u64,
    /// The mean of the candidate's margin less that of the version served.
    pub mean_margin_shift: f64,
    /// What flips into what, the most frequent first; null is unknown.
    pub transitions: Vec<Transition>,
    /// Flips that `transitions` does not name.
    pub other_flips: u64,
    /// The latest flips.
    pub examples: Vec<Example>,
}

impl ShadowReport {
    /// Adds another worker's counts for the same two versions.
    pub fn add(&mut self, other: &Self) {
        let total = (self.images + other.images).max(1) as f64;
        self.mean_margin_shift = (self.mean_margin_shift * self.images as f64
            + other.mean_margin_shift * other.images as f64)
            / total;
        self.loaded &= other.loaded;
        self.images += other.images;
        self.flips += other.flips;
        self.became_unknown += other.became_unknown;
        self.became_known += other.became_known;
        self.other_flips += other.other_flips;
        for transition in &other.transitions {
            let same = |t: &&mut Transition| t.from == transition.from && t.to == transition.to;
            match self.transitions.iter_mut().find(same) {
                Some(known) => known.count += transition.count,
                None => self.transitions.push(transition.clone()),
            }
        }
        sort(&mut self.transitions);
        self.examples.extend(other.examples.iter().cloned());
    }
}

/// Puts the most frequent first.
pub fn sort(transitions: &mut [Transition]) {
    transitions.sort_by(|a, b| {
        b.count.cmp(&a.count).then_with(|| (&a.from, &a.to).cmp(&(&b.from, &b.to)))
    });
}

/// How many images flip from one label to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// The label now; null: unknown.
    pub from: Option<String>,
    /// The candidate's.
    pub to: Option<String>,
    /// Images.
    pub count: u64,
}

/// One image whose label would be another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// The image.
    pub uri: String,
    /// The label now; null: unknown.
    pub from: Option<String>,
    /// The candidate's.
    pub to: Option<String>,
    /// The best scores, now and with the candidate.
    pub scores: (f32, f32),
}
