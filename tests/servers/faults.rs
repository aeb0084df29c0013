//! One fault at a time, against real workers, a real broker and a real store: what happens then, in
//! each test's name. `tests/servers/soak` mixes them.

mod addresses;
mod broker;
mod cluster;
mod credentials;
mod ledger;
mod proxy;
mod publish;
mod quarantine;
mod queues;
mod store;
mod unparsable;
mod workers;
mod world;
