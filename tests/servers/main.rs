//! Tests that talk to a real broker and a real store, which `tests/run.sh` starts.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the report.

#[path = "../support/mod.rs"]
mod support;

mod bench;
mod bulk;
mod classes;
mod classes_files;
mod classify;
mod conformance;
mod contracts;
mod dead;
mod docs;
mod doctor;
mod examples;
mod faults;
mod hostile;
mod http;
mod readme;
mod report;
mod soak;
mod suspects;
mod swap;
mod tls;
mod worker;
