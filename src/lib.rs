//! The program `angler`: settings, commands, the HTTP server, and the one place that puts the parts of
//! the workspace together.
//!
//! angler classifies images by metric learning: a CNN's embedding of an image is compared by cosine
//! similarity with versioned class vectors, and the nearest class wins. The crates under `crates/`
//! do that; ARCHITECTURE.md follows one job from end to end. Read [`app`] first, which builds
//! a worker from the settings, then [`commands`], one file per command.
//!
//! This library is for the program, its tests and its measurements. It promises nothing to others.

pub mod app;
pub mod builtin_model;
pub mod commands;
pub mod config;
pub mod http;
pub mod shutdown;
pub mod telemetry;
