//! angler classifies images by metric learning: a CNN's embedding of an image is compared by
//! cosine similarity with versioned class vectors, and the nearest class wins.
//!
//! The data path, as a reading list:
//!
//! 1. [`source`] hands out a [`job`]: one or more images, and the class set to use.
//! 2. [`worker`] admits it image by image; this is the file to read first.
//! 3. [`pipeline`] takes one image: fetched from a [`store`], decoded and cut by [`preprocess`],
//!    handed to the engine.
//! 4. [`engine`] forms batches across jobs, runs them through an [`embed`]der on its own thread
//!    and lets [`score`] compare them with the job's version of [`classes`].
//! 5. [`sink`] publishes the result, and only then is the delivery settled.
//!
//! [`app`] puts the parts together by [`config`]; [`cli`] is one file a command, and [`page`] is what
//! commands show results with. ARCHITECTURE.md follows one job from end to end.

pub mod amqp;
pub mod app;
pub mod bulk;
pub mod classes;
pub mod cli;
pub mod config;
pub mod control;
pub mod embed;
pub mod engine;
pub mod error;
pub mod health;
pub mod job;
pub mod metrics;
pub mod model;
pub mod outage;
pub mod pace;
pub mod page;
pub mod pipeline;
pub mod preprocess;
pub mod readiness;
pub mod retry;
pub mod score;
pub mod shutdown;
pub mod sink;
pub mod source;
pub mod stopwatch;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod trace;
pub mod watchdog;
mod words;
pub mod worker;
