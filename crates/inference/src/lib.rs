//! The model: pixels in, best classes out.
//!
//! [`model`] reads a model folder and edits its graph, [`embed`] executes it on a GPU or a CPU, and
//! [`engine`] forms batches across jobs. This crate knows no job, no broker and no store. Begin with
//! [`engine`].

pub mod embed;
pub mod engine;
pub mod model;
