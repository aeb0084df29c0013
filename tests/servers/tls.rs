//! TLS, end to end: certificates made here, a RabbitMQ that demands one of its clients, a SeaweedFS
//! that speaks HTTPS, and `angler worker` between them.

mod both;
mod broker;
mod collector;
mod pki;
mod servers;
mod store;
