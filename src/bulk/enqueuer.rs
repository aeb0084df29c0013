//! Sends the jobs of a run: in order, on one channel, confirms pipelined.
//!
//! One channel, because the order is what makes a run resumable ([`super::queues`]), and one
//! publisher on it, so that lapin cannot mix up tags. Whatever ends it, a signal, a lost connection or
//! a kill, it goes on behind the last job that the broker has.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldArray, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, PublisherConfirm};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::queues::{DIGEST, RunQueues, Sent};
use super::reconnect::{Ended, Failed, Reconnect};
use super::registry::{self, Begun};
use super::spool::Images;
use crate::amqp::ask::{answer, look_at};
use crate::amqp::topology::Topology;
use crate::amqp::{AmqpError, AmqpOptions, put, short};
use crate::job::{ClassSelector, JOB_TYPE, Job, Run, hex};

/// Jobs that were sent and are not confirmed.
const IN_FLIGHT: usize = 256;
/// How often the length of the queue is looked at, and whether the run was cancelled.
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
    /// The run was cancelled: nothing more is sent.
    Cancelled,
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

impl From<EnqueueError> for Failed<EnqueueError> {
    fn from(error: EnqueueError) -> Self {
        Self::Final(error)
    }
}

/// Where the jobs go.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    /// How the broker is reached.
    pub options: &'a AmqpOptions,
    /// The queues around the one that takes the jobs.
    pub topology: &'a Topology,
    /// The fleet's first queue of jobs, which the runs' queues are named after.
    pub first: &'a str,
}

/// Sends what the broker does not have yet, and yields how many jobs of the run it has then: fewer
/// than all only after `stop`, or if the run was cancelled.
///
/// # Errors
/// [`EnqueueError`]. What was sent stays sent.
pub async fn enqueue(
    target: Target<'_>,
    plan: &Plan,
    images: &mut Images,
    stop: &CancellationToken,
    mut seen: impl FnMut(Step),
) -> Result<u64, EnqueueError> {
    let mut confirmed = 0;
    let queues = RunQueues::new(target.first, &plan.run);
    let sender = Sender { target, queues: &queues, plan, stop };
    let connections =
        Reconnect { options: target.options, role: "enqueue", stop, patience: PATIENCE };
    let ended = connections
        .run(async |connection, progress| {
            let told = |step: Step| {
                *progress = Instant::now();
                seen(step);
            };
            sender.send(connection, images, &mut confirmed, told).await
        })
        .await?;
    match ended {
        Ended::Done(()) | Ended::Stopped => Ok(confirmed),
        // Not an attempt's fault: nobody wants it any more.
        Ended::Away(_) if stop.is_cancelled() => Ok(confirmed),
        Ended::Away(reason) => Err(EnqueueError::Broker { seconds: PATIENCE.as_secs(), reason }),
    }
}

struct Sender<'a> {
    target: Target<'a>,
    queues: &'a RunQueues,
    plan: &'a Plan,
    stop: &'a CancellationToken,
}

/// What is asked of the broker while jobs are sent.
struct Asking<'a> {
    connection: &'a Connection,
    /// Confirms, and has nothing else in flight.
    channel: Channel,
    /// When it was looked last, and how many jobs there was room for.
    looked: Option<(Instant, u64)>,
}

impl Asking<'_> {
    /// Whether there is room for a job, by what was seen last and sent since.
    fn has_room(&self) -> bool {
        self.looked.is_some_and(|(at, room)| room > 0 && at.elapsed() < LOOK)
    }
}

type Outcome<T> = Result<T, Failed<EnqueueError>>;

impl Sender<'_> {
    async fn send(
        &self,
        connection: &Connection,
        images: &mut Images,
        confirmed: &mut u64,
        mut seen: impl FnMut(Step),
    ) -> Outcome<()> {
        let Self { target: Target { topology, .. }, queues, plan, stop } = self;
        for mismatch in topology.declare(connection).await.map_err(AmqpError::from)? {
            tracing::warn!("{mismatch}");
        }
        let channel = answer(connection.create_channel()).await?;
        queues.declare(&channel).await?;
        let (jobs, digest) = (plan.jobs(images.len()), plan.digest(images));
        *confirmed = match queues.sent(connection).await? {
            None => {
                self.register(connection, jobs, images.len()).await?;
                0
            }
            Some(Sent { run, digest: sent }) if sent == digest => run.index + 1,
            Some(Sent { run, .. }) => {
                let other =
                    EnqueueError::Other { run: run.id, sent: run.index + 1, jobs: run.jobs };
                return Err(other.into());
            }
        };
        seen(Step::Sent(*confirmed));
        let confirm = ConfirmSelectOptions::default();
        answer(channel.confirm_select(confirm)).await?;
        let asking = answer(connection.create_channel()).await?;
        answer(asking.confirm_select(confirm)).await?;
        let mut asking = Asking { connection, channel: asking, looked: None };
        let properties = self.properties(&digest);
        let mut waiting: VecDeque<PublisherConfirm> = VecDeque::with_capacity(IN_FLIGHT);
        let first = *confirmed;
        let unsent = images.jobs_from(first, plan.per_job).map_err(EnqueueError::from)?;
        for (index, job) in (first..).zip(unsent) {
            // What is not confirmed may not be in the queue yet, whose length is looked at.
            let looks = plan.max_queued.is_some() && !asking.has_room();
            let most = if looks { 1 } else { IN_FLIGHT };
            while waiting.len() >= most {
                self.confirm(&mut waiting, confirmed, &mut seen).await?;
            }
            if !self.may_send(&mut asking, &mut seen).await? || stop.is_cancelled() {
                break;
            }
            let job = plan.job(index, jobs, job.map_err(EnqueueError::from)?);
            let properties = properties.clone().with_message_id(short(&job.id));
            let mandatory =
                BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let body = serde_json::to_vec(&job).map_err(EnqueueError::from)?;
            let publishing = channel.basic_publish(
                "".into(),
                short(&topology.jobs),
                mandatory,
                &body,
                properties,
            );
            waiting.push_back(answer(publishing).await?);
        }
        while !waiting.is_empty() {
            self.confirm(&mut waiting, confirmed, &mut seen).await?;
        }
        Ok(())
    }

    /// Puts the run on the list of runs.
    async fn register(&self, connection: &Connection, jobs: u64, images: u64) -> Outcome<()> {
        let Self { target, plan, .. } = self;
        let begun = Begun {
            run: plan.run.clone(),
            jobs,
            images,
            classes: plan.classes.to_string(),
            queue: target.topology.jobs.clone(),
            at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        };
        let channel = answer(connection.create_channel()).await?;
        registry::add(&channel, target.first, &begun).await?;
        answer(channel.close(200, "done".into())).await?;
        Ok(())
    }

    fn properties(&self, digest: &str) -> BasicProperties {
        let mut headers = FieldTable::default();
        put(&mut headers, DIGEST, digest);
        let copies = vec![AMQPValue::LongString(self.queues.sent.as_str().into())];
        headers.insert(short("BCC"), AMQPValue::FieldArray(FieldArray::from(copies)));
        BasicProperties::default()
            .with_headers(headers)
            .with_delivery_mode(2)
            .with_type(JOB_TYPE.into())
            .with_content_type("application/json".into())
            .with_reply_to(short(&self.queues.results))
    }

    /// Waits for the oldest confirm.
    async fn confirm(
        &self,
        waiting: &mut VecDeque<PublisherConfirm>,
        confirmed: &mut u64,
        seen: &mut impl FnMut(Step),
    ) -> Outcome<()> {
        let Some(oldest) = waiting.pop_front() else { return Ok(()) };
        match answer(oldest).await? {
            Confirmation::Ack(None) => {
                *confirmed += 1;
                seen(Step::Sent(*confirmed));
                Ok(())
            }
            Confirmation::Ack(Some(_)) => {
                Err(EnqueueError::NoQueue(self.target.topology.jobs.clone()).into())
            }
            _ => Err(Failed::Connection("the broker refused a job".to_owned())),
        }
    }

    /// Waits until the queue of jobs is short enough; false if the run was cancelled.
    async fn may_send(
        &self,
        asking: &mut Asking<'_>,
        seen: &mut impl FnMut(Step),
    ) -> Outcome<bool> {
        loop {
            if asking.has_room()
                && let Some((_, room)) = &mut asking.looked
            {
                *room -= 1;
                return Ok(true);
            }
            if self.queues.is_cancelled(&asking.channel).await? {
                seen(Step::Cancelled);
                return Ok(false);
            }
            let Some(most) = self.plan.max_queued else {
                asking.looked = Some((Instant::now(), u64::MAX));
                continue;
            };
            let jobs = look_at(asking.connection, &self.target.topology.jobs).await?;
            let queued = jobs.map_or(0, |queue| queue.ready);
            let room = most.saturating_sub(queued);
            asking.looked = Some((Instant::now(), room));
            if room == 0 {
                seen(Step::Full { queued });
                tokio::select! {
                    () = sleep(LOOK) => {}
                    () = self.stop.cancelled() => return Ok(true),
                }
            }
        }
    }
}
