//! Class vectors: one immutable version of one class set, and all that is computed from it.
//!
//! The file format ([`mod@file`]), cosine similarity and the best classes ([`score`]), thresholds
//! ([`calibrate`]), evaluation and comparison. Everything here is a value or a pure function: no
//! file, no network, no runtime. Begin with [`ClassVectors`].

pub mod active;
pub mod calibrate;
mod class_vectors;
pub mod compare;
pub mod evaluate;
pub mod file;
pub mod matrix;
pub mod medoids;
pub mod neighbours;
pub mod outliers;
pub mod reference_embeddings;
pub mod rows;
pub mod score;
pub mod statistics;
pub mod unit;

pub use class_vectors::{ClassVectors, ClassesError, Contents, Labels, Opinion};
