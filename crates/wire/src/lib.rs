//! What travels over the wire: jobs, results, control messages and error codes, as JSON.
//!
//! A program that sends jobs or reads results can depend on this crate alone. It knows no broker, no
//! runtime and no model. Begin with [`job`]; docs/wire-format.md describes the same for people.

pub mod control;
pub mod error;
pub mod job;
pub mod text;
