//! Bulk runs: many images as jobs that belong together, and their results in one file.
//!
//! A run has no database. The broker keeps what there is to know of it: the results, in a queue of
//! the run's own until they are collected ([`run_queues`](angler_amqp::run_queues)), and how far it was
//! sent ([`mark`]). A command that continues a run reads the list of images again from the same source
//! ([`spool`]) and recognises the run by its digest.
//!
//! This crate knows no model and no worker. Read [`enqueuer`] first, then [`collector`].

pub mod collector;
pub mod embeddings;
pub mod enqueuer;
pub mod finished_jobs;
pub mod journal;
pub mod manifest;
pub mod mark;
mod reconnect;
pub mod registry;
pub mod result;
pub mod spool;
pub mod table;
