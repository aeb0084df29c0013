//! Tests that need no server: the model, pixels, the pipeline in process, pages in a browser, the shell.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the report.

#[path = "../support/mod.rs"]
mod support;

mod contributing;
mod devices;
mod fused;
mod fuzz;
mod model;
mod page;
mod pipeline;
mod preprocess;
mod shell;
