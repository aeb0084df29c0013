//! A worker's ear on the [control exchange](super::control).
//!
//! Each worker has an exclusive queue of its own, bound to the fanout exchange; it is gone with the
//! worker's connection. Requests may be lost with it, so on every new connection the worker looks
//! at everything it would have been told.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use angler_core::class_sets::catalog::Catalog;
use angler_core::class_sets::shadow::Shadow;
use angler_wire::control::{Answer, MAX_REQUEST_BYTES, REPLY_TYPE, REQUEST_TYPE, Reply, Request};
use angler_wire::text::chain;

use super::control::{Open, open};
use super::losses::{JobCopy, Losses};
use super::topology::Topology;
use super::{AmqpOptions, Backoff, close};

/// Requests that a worker answers at once.
const AT_ONCE: usize = 16;
/// What publishing a reply may take. Under a memory or disk alarm the broker accepts none, but still
/// delivers requests: those must not wait for replies.
const REPLY: Duration = Duration::from_secs(2);

/// Listens on the control exchange.
pub struct ControlListener {
    options: AmqpOptions,
    topology: Topology,
    losses: Arc<Losses>,
    catalog: Arc<Catalog>,
    shadow: Option<Arc<Shadow>>,
}

impl ControlListener {
    /// A listener that connects when it is run.
    pub fn new(
        options: AmqpOptions,
        topology: Topology,
        losses: Arc<Losses>,
        catalog: Arc<Catalog>,
        shadow: Option<Arc<Shadow>>,
    ) -> Self {
        Self { options, topology, losses, catalog, shadow }
    }

    /// Listens until the call is dropped; a connection that is lost is replaced.
    pub async fn run(self: Arc<Self>) {
        let mut backoff = Backoff::default();
        loop {
            let reason = match open(&self.options, &self.topology, "control").await {
                Ok(open) => {
                    let reason = self.listen(&open, &mut backoff).await;
                    close(&open.connection).await;
                    reason
                }
                Err(error) => chain(&error),
            };
            let pause = backoff.pause();
            tracing::warn!(
                exchange = self.topology.control_exchange,
                pause_seconds = pause.as_secs_f64(),
                "announcements are not heard, polling goes on: {reason}"
            );
            sleep(pause).await;
        }
    }

    /// Answers until the consumer ends; yields why it did.
    async fn listen(self: &Arc<Self>, open: &Open, backoff: &mut Backoff) -> String {
        let mut requests = match open.consume(&self.topology.control_exchange).await {
            Ok((_, consumer)) => consumer,
            Err(error) => return chain(&error),
        };
        backoff.reset();
        // What was announced while nobody listened.
        self.catalog.refresh_all().await;
        let mut answers = JoinSet::new();
        loop {
            let next = tokio::select! {
                next = requests.next() => next,
                Some(_) = answers.join_next() => continue,
            };
            let message = match next {
                Some(Ok(message)) => message,
                Some(Err(error)) => return error.to_string(),
                None => return "the consumer was cancelled, or its connection is gone".to_owned(),
            };
            while answers.len() >= AT_ONCE {
                answers.join_next().await;
            }
            let (listener, channel) = (Arc::clone(self), open.channel.clone());
            answers.spawn(async move { listener.answer(&channel, message).await });
        }
    }

    async fn answer(&self, channel: &Channel, message: lapin::message::Delivery) {
        let kind = message.properties.kind().as_ref().map(ShortString::as_str);
        let request = match serde_json::from_slice(&message.data) {
            Ok(request)
                if message.data.len() <= MAX_REQUEST_BYTES && kind == Some(REQUEST_TYPE) =>
            {
                request
            }
            Ok(_) | Err(_) => {
                tracing::debug!(kind, "a control message that is not understood is passed over");
                return;
            }
        };
        let reply = |answer| self.reply(channel, &message.properties, answer);
        match request {
            Request::Activated { set, .. } => {
                // The version is loaded whether or not anyone can be told.
                let ((), set) = tokio::join!(reply(Answer::Heard), self.catalog.refresh(&set));
                reply(Answer::Serving { set }).await;
            }
            Request::Status => reply(Answer::Status { sets: self.catalog.status() }).await,
            Request::Shadow => {
                let report = self.shadow.as_ref().map(|shadow| Box::new(shadow.report()));
                reply(Answer::Shadow { report }).await;
            }
            Request::Losses { job, stamp } => {
                let count = self.losses.of(&JobCopy { job, stamp });
                reply(Answer::Losses { count }).await;
            }
        }
    }

    /// A reply that is lost is asked for again, or not: nothing depends on it.
    async fn reply(&self, channel: &Channel, request: &BasicProperties, answer: Answer) {
        let Some(to) = request.reply_to() else { return };
        let worker = self.options.name.clone();
        let reply = Reply { worker, instance: self.losses.instance().to_owned(), answer };
        let Ok(body) = serde_json::to_vec(&reply) else { return };
        let mut properties = BasicProperties::default()
            .with_type(REPLY_TYPE.into())
            .with_content_type("application/json".into());
        if let Some(id) = request.correlation_id() {
            properties = properties.with_correlation_id(id.clone());
        }
        let options = BasicPublishOptions::default();
        let sending = channel.basic_publish("".into(), to.clone(), options, &body, properties);
        match timeout(REPLY, sending).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::debug!("lost a reply to a control request: {error}"),
            Err(_) => tracing::debug!("lost a reply to a control request: the broker blocks"),
        }
    }
}
