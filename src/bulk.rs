//! Bulk runs: many images as jobs that belong together, and their results in one file.
//!
//! A run has no database. What there is to know of it is in the broker: its results, in a queue of
//! its own until they are collected, and the last job that was sent ([`queues`]). The list of its
//! images is made anew from the same source by whoever continues it ([`spool`]), and recognised by
//! its digest.

pub mod cancelled;
pub mod collector;
pub mod embeddings;
pub mod enqueuer;
pub mod journal;
pub mod manifest;
pub mod queues;
mod reconnect;
pub mod registry;
pub mod result;
pub mod spool;
pub mod table;
