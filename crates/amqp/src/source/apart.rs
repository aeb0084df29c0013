//! Jobs that may kill the process, and the evidence against them.
//!
//! A delivery that came back was held by a worker that died, or only lost its connection, kept the job
//! too long or handed it back. One such delivery is no evidence: the job runs again among others. At
//! the second the job is a suspect, unless workers that live say that it was they who lost it
//! ([`losses`](crate::losses)). It is moved to the queue of suspects, and runs alone.
//!
//! Each copy in that queue has a stamp and the number of its lone run. A copy that came back is a lone
//! run that did not end. If a process died of it, the copy is replaced by one with the next number, and
//! after the third the job is given up.

use std::time::Duration;

use lapin::options::BasicGetOptions;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use angler_core::source::Delivery;
use angler_wire::error::{Failure, FailureCode};

use super::AmqpSource;
use super::incoming::Incoming;
use super::settle::Origin;
use crate::losses::Losses;
use crate::short;
use crate::source::consumer::Live;

/// How many deliveries of a job among others have to come back before it is set apart. A connection
/// that breaks returns all jobs of its worker, and rarely the same ones twice.
const EVIDENCE: u32 = 2;

/// The broker's word for a message that a worker left to its dead-lettering.
const REJECTED: &str = "rejected";

/// How many processes a suspect may kill before it is given up.
const LONE_RUNS: u32 = 3;

/// How long the broker may take to answer before suspects are left for later.
const GET: Duration = Duration::from_secs(5);

/// How long an answer to that question is still expected. Then the channel is closed, so that the
/// broker keeps the message.
const GET_AT_LAST: Duration = Duration::from_secs(30);

/// How long a suspect waits that cannot be given up, because the other workers cannot be asked.
const ASK_AGAIN: Duration = Duration::from_secs(30);

impl AmqpSource {
    /// Returns the delivery of a job, or looks into it first, beside the way of the others.
    pub(super) fn consider(&mut self, incoming: Incoming) -> Option<Delivery> {
        if incoming.message.origin == Origin::Undeliverable {
            return self.answer_for_broker(incoming);
        }
        if !self.is_suspicious(&incoming) {
            return Some(incoming.deliver());
        }
        self.look_into(incoming);
        None
    }

    /// Returns the delivery of a job that the broker gave up, so that it has a result.
    fn answer_for_broker(&mut self, incoming: Incoming) -> Option<Delivery> {
        let death = incoming.death().unwrap_or_default();
        if death == REJECTED {
            // By a worker, after it published the result: the message is too large to be published.
            self.judging.spawn(async move {
                incoming.message.ack.reject().await;
                None
            });
            return None;
        }
        Some(incoming.give_up(undeliverable(&death)))
    }

    /// Returns whether more deliveries of a job came back than is explained by what this process knows.
    pub(super) fn is_suspicious(&self, incoming: &Incoming) -> bool {
        incoming.message.origin == Origin::Jobs
            && incoming.came_back(EVIDENCE)
                >= self.losses.of(&incoming.copy).saturating_add(EVIDENCE)
    }

    pub(super) fn look_into(&mut self, incoming: Incoming) {
        let (losses, lost) = (self.losses.clone(), incoming.lost.clone());
        self.judging.spawn(async move {
            let judged = async {
                match incoming.message.origin {
                    Origin::Jobs | Origin::Undeliverable => judge_job(incoming, &losses).await,
                    Origin::Suspects => judge_suspect(incoming, &losses).await,
                }
            };
            lost.run_until_cancelled(Box::pin(judged)).await.flatten()
        });
    }

    /// Returns a suspect that can run, or `None` if there is none now.
    pub(super) async fn next_suspect(&mut self) -> Option<Delivery> {
        loop {
            let incoming = self.get_suspect().await?;
            if incoming.came_back(1) <= self.losses.of(&incoming.copy) {
                return Some(incoming.deliver());
            }
            self.look_into(incoming);
        }
    }

    /// Takes the next suspect from the broker. An answer that comes too late, or after this call was
    /// dropped, is handed back.
    async fn get_suspect(&self) -> Option<Incoming> {
        // Not with the rest of a connection that is lost: its jobs are let go at once, and each time counts.
        let live = self.live.as_ref().filter(|live| !live.lost.is_cancelled())?;
        let Live { suspects: channel, suspect_acks: acks, lost, .. } = live;
        let (channel, acks, lost) = (channel.clone(), acks.clone(), lost.clone());
        let (reader, queue) = (self.reader.clone(), self.reader.topology.suspects_queue());
        let (sender, receiver) = oneshot::channel();
        tokio::spawn(async move {
            let get = channel.basic_get(short(&queue), BasicGetOptions::default());
            match timeout(GET_AT_LAST, get).await {
                Ok(Ok(Some(got))) => {
                    let incoming = reader.read(Origin::Suspects, got.delivery, &acks, lost);
                    let _ = sender.send(incoming); // What nobody takes goes back.
                }
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::debug!(queue, "suspects cannot be read: {error}"),
                Err(_) => {
                    tracing::warn!(queue, "the broker does not answer, and its channel is closed");
                    let _ = channel.close(200, "no answer".into()).await;
                }
            }
        });
        timeout(GET, receiver).await.ok()?.ok()
    }
}

/// Looks into a job that came back more than once.
async fn judge_job(incoming: Incoming, losses: &Losses) -> Option<Delivery> {
    let came_back = incoming.came_back(EVIDENCE);
    let innocent = came_back - (EVIDENCE - 1);
    // Alone it harms no other job: so it is set apart if nobody can be asked.
    let witnessed = losses.of_all(&incoming.copy, innocent).await.unwrap_or(0);
    if witnessed >= innocent {
        return Some(incoming.deliver());
    }
    tracing::info!(
        job = incoming.copy.job,
        came_back,
        "workers died while they held this job, which now runs alone"
    );
    set_apart(incoming, 1).await
}

/// Looks into a suspect whose lone run did not end.
async fn judge_suspect(incoming: Incoming, losses: &Losses) -> Option<Delivery> {
    let (came_back, run) = (incoming.came_back(1), incoming.message.lone_run);
    let asked = match run < LONE_RUNS {
        true => losses.of_all(&incoming.copy, came_back).await,
        false => losses.of_all_at_last(&incoming.copy, came_back).await,
    };
    let job = &incoming.copy.job;
    match asked {
        Ok(witnessed) if witnessed >= came_back => {
            tracing::info!(job, run, "a lone run ended early, but its worker lives");
            set_apart(incoming, run).await
        }
        Err(error) if run >= LONE_RUNS => {
            tracing::warn!(
                job,
                run,
                "the other workers cannot be asked what became of this job, so it is not given up yet: {error}"
            );
            sleep(ASK_AGAIN).await;
            None
        }
        Ok(_) if run >= LONE_RUNS => Some(incoming.give_up(given_up())),
        _ => {
            tracing::warn!(job, run, "a worker died while it ran this job alone");
            set_apart(incoming, run + 1).await
        }
    }
}

/// Moves it to the end of the queue of suspects, for a lone run of this number.
async fn set_apart(mut incoming: Incoming, run: u32) -> Option<Delivery> {
    match incoming.message.set_apart(run).await {
        Ok(()) => None,
        Err((message, error)) => {
            incoming.message = *message;
            let failure = format!("it cannot be moved to the queue of suspects: {error}");
            Some(incoming.give_up(Failure::new(FailureCode::RetriesExhausted, failure)))
        }
    }
}

/// Why a suspect is not run again.
fn given_up() -> Failure {
    Failure::new(
        FailureCode::RetriesExhausted,
        format!(
            "workers died each time that they worked on this job: among others, and then {LONE_RUNS} \
             times alone. An image of it may be what kills the process; the workers' logs and the \
             system's (out of memory?) say more"
        ),
    )
}

/// Why a job is not worked on that the broker gave up.
///
/// * `death`: the broker's word.
fn undeliverable(death: &str) -> Failure {
    let why = match death {
        "delivery_limit" => {
            "its deliveries came back too often (delivery_limit): workers died, their connections broke, or they kept it longer than the broker's consumer_timeout".to_owned()
        }
        other => format!("the broker took it from its queue ({other})"),
    };
    Failure::new(FailureCode::RetriesExhausted, format!("the broker gave this job up: {why}"))
}
