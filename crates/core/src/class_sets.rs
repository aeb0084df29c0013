//! Versions of class sets in a store: found, loaded, kept, swapped, published and tried.

pub mod build;
pub mod catalog;
pub mod load;
pub mod publish;
pub mod shadow;
