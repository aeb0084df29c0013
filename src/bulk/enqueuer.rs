//! Sends the jobs of a run: in order, on one channel, confirms pipelined.
//!
//! One channel, because the order is what makes a run resumable ([`super::queues`]), and one
//! publisher on it, so that lapin cannot mix up tags. Whatever ends it, a signal, a lost connection or
//! a kill, it goes on behind the last job that the broker has.

use std::collections::VecDeque;
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldArray, FieldTable};
use lapin::{BasicProperties, Confirmation, Connection, PublisherConfirm};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::queues::{DIGEST, RunQueues, Sent, answer, ready};
use super::spool::Images;
use crate::amqp::topology::Topology;
use crate::amqp::{AmqpError, AmqpOptions, Backoff, close, connect, put, short};
use crate::job::{ClassSelector, JOB_TYPE, Job, Run, hex};

/// Jobs that were sent and are not confirmed.
const IN_FLIGHT: usize = 256;
/// How often the length of the queue is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long a broker that is away is waited for.
const PATIENCE: Duration = Duration::from_secs(300);

/// What all jobs of a run have in common.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The run's id.
    pub run: String,
    /// Images in a job; the last may have fewer.
    pub per_job: usize,
    /// What they are scored against.
    pub classes: ClassSelector,
    /// How many of the best classes are listed for each image.
    pub top_k: usize,
    /// Below it an image is unknown; none: the set's own threshold.
    pub min_score: Option<f32>,
    /// Whether embeddings come back.
    pub embeddings: bool,
    /// Nothing is sent while so many jobs wait in the queue.
    pub max_queued: Option<u64>,
}

impl Plan {
    /// How many jobs so many images make.
    pub fn jobs(&self, images: u64) -> u64 {
        images.div_ceil(self.per_job as u64)
    }

    /// Job number `index` of `jobs`.
    pub fn job(&self, index: u64, jobs: u64, images: Vec<crate::job::ImageRef>) -> Job {
        Job {
            id: format!("{}/{index}", self.run),
            images,
            classes: self.classes.clone(),
            top_k: self.top_k,
            min_score: self.min_score,
            embeddings: self.embeddings,
            run: Some(Run { id: self.run.clone(), jobs, index }),
        }
    }

    /// What a run is recognised by: its images, and how they are sent.
    pub fn digest(&self, images: &Images) -> String {
        let Self { per_job, classes, top_k, min_score, embeddings, .. } = self;
        let how = format!("{per_job} {classes} {top_k} {min_score:?} {embeddings}");
        let mut digest = Sha256::new();
        digest.update(images.digest());
        digest.update(how);
        hex(&digest.finalize())[..32].to_owned()
    }
}

/// What is told while it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// So many jobs are in the queue or were, counted from the run's first.
    Sent(u64),
    /// Nothing is sent until the queue has become shorter.
    Full {
        /// Jobs that wait in it.
        queued: u64,
    },
}

/// Why a run was not sent whole.
#[derive(Debug, thiserror::Error)]
pub enum EnqueueError {
    /// The run was begun with other images.
    #[error(
        "run {run} was begun with other images or options ({sent} of {jobs} jobs were sent): give this one another --run, or cancel that with `angler runs cancel {run}`"
    )]
    Other {
        /// The run's id.
        run: String,
        /// Jobs of it that were sent.
        sent: u64,
        /// Jobs that it was to have.
        jobs: u64,
    },
    /// The queue of jobs was deleted meanwhile.
    #[error("the queue {0} does not exist any more")]
    NoQueue(String),
    /// The broker was away for too long.
    #[error("the broker took nothing for {seconds} s: {reason}")]
    Broker {
        /// For how long.
        seconds: u64,
        /// What it said last.
        reason: String,
    },
    /// The list of images could not be read again.
    #[error("the list of images cannot be read: {0}")]
    Images(#[from] std::io::Error),
    /// A job is not what it should be.
    #[error("a job cannot be written: {0}")]
    Json(#[from] serde_json::Error),
}

/// One attempt's end.
enum Failed {
    /// Another connection may do.
    Connection(String),
    Final(EnqueueError),
}

impl From<AmqpError> for Failed {
    fn from(error: AmqpError) -> Self {
        Self::Connection(error.to_string())
    }
}

impl From<lapin::Error> for Failed {
    fn from(error: lapin::Error) -> Self {
        Self::Connection(error.to_string())
    }
}

impl From<std::io::Error> for Failed {
    fn from(error: std::io::Error) -> Self {
        Self::Final(error.into())
    }
}

impl From<serde_json::Error> for Failed {
    fn from(error: serde_json::Error) -> Self {
        Self::Final(error.into())
    }
}

/// Sends what the broker does not have yet, and yields how many jobs of the run it has then: fewer
/// than all only after `stop`.
///
/// # Errors
/// [`EnqueueError`]. What was sent stays sent.
pub async fn enqueue(
    (options, topology): (&AmqpOptions, &Topology),
    plan: &Plan,
    images: &mut Images,
    stop: &CancellationToken,
    mut seen: impl FnMut(Step),
) -> Result<u64, EnqueueError> {
    let (mut backoff, mut trying) = (Backoff::default(), Instant::now());
    let mut confirmed = 0;
    loop {
        let before = confirmed;
        let sender = Sender { topology, plan, stop };
        let outcome = match connect(options, "enqueue").await {
            Ok(connection) => {
                let outcome = sender.send(&connection, images, &mut confirmed, &mut seen).await;
                close(&connection).await;
                outcome
            }
            Err(error) => Err(error.into()),
        };
        let reason = match outcome {
            Ok(()) => return Ok(confirmed),
            Err(Failed::Final(error)) => return Err(error),
            Err(Failed::Connection(reason)) => reason,
        };
        if confirmed > before {
            backoff.reset();
            trying = Instant::now();
        }
        if trying.elapsed() > PATIENCE {
            return Err(EnqueueError::Broker { seconds: PATIENCE.as_secs(), reason });
        }
        if stop.is_cancelled() {
            return Ok(confirmed);
        }
        let pause = backoff.next();
        tracing::warn!(
            pause_seconds = pause.as_secs_f64(),
            "enqueuing goes on in a moment: {reason}"
        );
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => return Ok(confirmed),
        }
    }
}

struct Sender<'a> {
    topology: &'a Topology,
    plan: &'a Plan,
    stop: &'a CancellationToken,
}

impl Sender<'_> {
    async fn send(
        &self,
        connection: &Connection,
        images: &mut Images,
        confirmed: &mut u64,
        seen: &mut impl FnMut(Step),
    ) -> Result<(), Failed> {
        let Self { topology, plan, stop } = self;
        for mismatch in topology.declare(connection).await? {
            tracing::warn!("{mismatch}");
        }
        let queues = RunQueues::new(&topology.jobs, &plan.run);
        let channel = answer(connection.create_channel()).await?;
        queues.declare(&channel).await?;
        let (jobs, digest) = (plan.jobs(images.len()), plan.digest(images));
        *confirmed = match queues.sent(connection).await? {
            None => 0,
            Some(Sent { run, digest: sent }) if sent == digest => run.index + 1,
            Some(Sent { run, .. }) => {
                let other =
                    EnqueueError::Other { run: run.id, sent: run.index + 1, jobs: run.jobs };
                return Err(Failed::Final(other));
            }
        };
        seen(Step::Sent(*confirmed));
        answer(channel.confirm_select(ConfirmSelectOptions::default())).await?;
        let properties = self.properties(&queues, &digest);
        let mut waiting: VecDeque<PublisherConfirm> = VecDeque::with_capacity(IN_FLIGHT);
        let (mut looked, mut index) = (None, *confirmed);
        for job in images.jobs_from(index, plan.per_job)? {
            if let Some(most) = plan.max_queued {
                self.room(connection, most, &mut looked, seen).await?;
            }
            if stop.is_cancelled() {
                break;
            }
            if waiting.len() >= IN_FLIGHT {
                self.confirm(&mut waiting, confirmed, seen).await?;
            }
            let job = plan.job(index, jobs, job?);
            let properties = properties.clone().with_message_id(short(&job.id));
            let mandatory =
                BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let body = serde_json::to_vec(&job)?;
            let publishing = channel.basic_publish(
                "".into(),
                short(&topology.jobs),
                mandatory,
                &body,
                properties,
            );
            waiting.push_back(answer(publishing).await?);
            index += 1;
        }
        while !waiting.is_empty() {
            self.confirm(&mut waiting, confirmed, seen).await?;
        }
        Ok(())
    }

    fn properties(&self, queues: &RunQueues, digest: &str) -> BasicProperties {
        let mut headers = FieldTable::default();
        put(&mut headers, DIGEST, digest);
        let copies = vec![AMQPValue::LongString(queues.sent.as_str().into())];
        headers.insert(short("BCC"), AMQPValue::FieldArray(FieldArray::from(copies)));
        BasicProperties::default()
            .with_headers(headers)
            .with_delivery_mode(2)
            .with_type(JOB_TYPE.into())
            .with_content_type("application/json".into())
            .with_reply_to(short(&queues.results))
    }

    /// Waits for the oldest confirm.
    async fn confirm(
        &self,
        waiting: &mut VecDeque<PublisherConfirm>,
        confirmed: &mut u64,
        seen: &mut impl FnMut(Step),
    ) -> Result<(), Failed> {
        let Some(oldest) = waiting.pop_front() else { return Ok(()) };
        match answer(oldest).await? {
            Confirmation::Ack(None) => {
                *confirmed += 1;
                seen(Step::Sent(*confirmed));
                Ok(())
            }
            Confirmation::Ack(Some(_)) => {
                Err(Failed::Final(EnqueueError::NoQueue(self.topology.jobs.clone())))
            }
            _ => Err(Failed::Connection("the broker refused a job".to_owned())),
        }
    }

    /// Waits until the queue of jobs is short enough.
    async fn room(
        &self,
        connection: &Connection,
        most: u64,
        looked: &mut Option<(Instant, u64)>,
        seen: &mut impl FnMut(Step),
    ) -> Result<(), Failed> {
        loop {
            match looked {
                // What was sent since the last look counts.
                Some((at, room)) if *room > 0 && at.elapsed() < LOOK => {
                    *room -= 1;
                    return Ok(());
                }
                _ => {}
            }
            let queued = ready(connection, &self.topology.jobs).await?.unwrap_or(0);
            let room = most.saturating_sub(queued);
            *looked = Some((Instant::now(), room));
            if room == 0 {
                seen(Step::Full { queued });
                tokio::select! {
                    () = sleep(LOOK) => {}
                    () = self.stop.cancelled() => return Ok(()),
                }
            }
        }
    }
}
