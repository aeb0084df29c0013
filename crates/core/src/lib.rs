//! The data path of a worker, and the ports that connect it to the world.
//!
//! [`source`], [`store`] and [`sink`] are ports: traits that brokers, stores and files are adapted to
//! in other crates, none of which is named here. [`worker`] takes a job from the first to the last;
//! it is the file to read first, and [`pipeline`], the way of one image, the second.

pub mod class_sets;
pub mod outage_detector;
pub mod pace;
pub mod pipeline;
pub mod readiness;
pub mod retry;
pub mod sink;
pub mod source;
pub mod store;
pub mod watchdog;
pub mod worker;
