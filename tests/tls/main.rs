//! TLS, end to end: certificates made here, a RabbitMQ that demands one of its clients, a SeaweedFS
//! that speaks HTTPS, and `angler worker` between them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the report.

#[path = "../support/mod.rs"]
mod support;

mod both;
mod broker;
mod collector;
mod pki;
mod servers;
mod store;
