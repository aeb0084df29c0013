//! The whole worker in one process: a queue in memory, an embedder without a model, a store and a
//! sink that can be held. No test sleeps: the clock stands still, and what a test waits for is a
//! condition.

mod rig;

mod apart;
mod batches;
mod limits;
mod outage;
mod outcomes;
mod stopping;
mod stuck;
