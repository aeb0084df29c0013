//! Where images and class sets lie: in S3, or in folders.
//!
//! Adapters of the ports in [`angler_core::store`]. They know no broker and no model. Begin with
//! [`s3`].

pub mod local;
pub mod s3;
