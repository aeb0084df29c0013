//! The contracts in `docs/` say what the code does: JSON Schemas of the messages, and the AsyncAPI document.
//!
//! The schemas are written by hand, for people who write producers and consumers. That they agree with the types is checked
//! here, by a validator that knows nothing of them (Python's `jsonschema`): what one accepts, the other reads.

mod asyncapi;
mod control;
mod job;

mod result;
mod schema;
