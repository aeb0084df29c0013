//! One connection after another that sends a run's jobs.

use std::time::{Duration, SystemTime};

use lapin::Connection;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use angler_amqp::Backoff;
use angler_amqp::ask::{answer, look_at};
use angler_amqp::run_queues::IdQueues;
use angler_amqp::turn::{Turn, TurnError};

use super::link::{Answers, Link, Outcome, Waiting, confirming, properties};
use super::unsent::Unsent;
use super::{EnqueueError, Obstacle, Plan, Step, Target};
use crate::mark;
use crate::mark::{Look, Mark, MarkError, Marker, Written, new_nonce};
use crate::reconnect::Failed;
use crate::registry;
use crate::registry::Begun;
use crate::spool::Images;

/// How often to look how long the queue is and whether the run was cancelled.
const LOOK: Duration = Duration::from_millis(500);
/// How often the mark is written while jobs are sent.
const MARK: Duration = Duration::from_millis(250);
/// How long to wait for another sender of the run to end.
const TURN: Duration = Duration::from_secs(5);

/// Sends a run over one connection after another.
pub(super) struct Sender<'a, F> {
    target: Target<'a>,
    names: IdQueues,
    plan: &'a Plan,
    images: &'a Images,
    stop: &'a CancellationToken,
    seen: F,
    /// What is left to send, once the run is known to exist.
    unsent: Option<Unsent<'a>>,
    /// An earlier connection may still have the turn.
    may_have_turn: bool,
    is_listed: bool,
    is_told: bool,
    has_warned: bool,
}

impl<'a, F: FnMut(Step)> Sender<'a, F> {
    pub(super) fn new(
        target: Target<'a>,
        plan: &'a Plan,
        images: &'a Images,
        stop: &'a CancellationToken,
        seen: F,
    ) -> Self {
        Self {
            target,
            names: IdQueues::new(target.first, &plan.run),
            plan,
            images,
            stop,
            seen,
            unsent: None,
            may_have_turn: false,
            is_listed: false,
            is_told: false,
            has_warned: false,
        }
    }

    /// Returns how many jobs are confirmed.
    pub(super) fn sent(&self) -> u64 {
        self.unsent.as_ref().map_or(0, Unsent::confirmed)
    }

    /// Makes the error of a run that was not sent whole.
    pub(super) fn unsent(&self, why: Obstacle) -> EnqueueError {
        let jobs = self.plan.jobs(self.images.len());
        let unsent = jobs.saturating_sub(self.sent());
        EnqueueError::Unsent { run: self.plan.run.clone(), unsent, jobs, why }
    }

    /// Sends what is left over this connection. Sets `progress` whenever the broker accepts something.
    pub(super) async fn attempt(
        &mut self,
        connection: &Connection,
        progress: &mut Instant,
    ) -> Outcome<()> {
        let Target { topology, first, .. } = self.target;
        for mismatch in topology.declare(connection).await? {
            tracing::warn!("{mismatch}");
        }
        self.take_turn(connection).await?;
        let marker = Marker::open(connection, &self.names).await?;
        let mark = self.find_or_begin(connection, &marker).await?;
        if mark.sent >= mark.jobs {
            self.tell(&mark, progress);
            return Ok(());
        }
        let queues = mark.queues(first);
        let jobs = confirming(connection).await?;
        // Once all jobs are sent, the results may have been collected and their queue deleted.
        if self.unsent.as_ref().is_some_and(|unsent| !unsent.is_done()) {
            self.list(connection, &mark).await?;
            queues.declare_results(&jobs).await?;
        }
        self.tell(&mark, progress);
        let mut link = Link {
            connection,
            marker,
            marked: Instant::now(),
            jobs,
            asking: confirming(connection).await?,
            looked: None,
            properties: properties(&queues),
            queues,
        };
        self.send(&mut link, progress).await
    }

    /// Tells once that the run exists.
    fn tell(&mut self, mark: &Mark, progress: &mut Instant) {
        if !self.is_told {
            self.is_told = true;
            *progress = Instant::now();
            (self.seen)(Step::Begun(mark.clone()));
            let sent = Step::Sent(self.sent());
            (self.seen)(sent);
        }
    }

    /// Waits until this process is the only one that sends the run.
    async fn take_turn(&mut self, connection: &Connection) -> Outcome<()> {
        // Without an answer the broker may have given the turn to this connection all the same.
        let may_have_turn = std::mem::replace(&mut self.may_have_turn, true);
        match Turn::take(connection, &self.names.sender, TURN).await {
            // Held until the connection ends.
            Ok(_) => Ok(()),
            Err(TurnError::Amqp(error)) => Err(error.into()),
            Err(TurnError::Busy { .. }) if may_have_turn => {
                let reason = "the broker has not noticed yet that the last connection was lost, or another command sends the run";
                Err(Failed::Connection(reason.into()))
            }
            Err(TurnError::Busy { .. }) => {
                let mark = mark::read(connection, &self.names).await.ok().flatten();
                let sender = mark.map_or_else(|| "another command".to_owned(), |mark| mark.sender);
                Err(EnqueueError::Busy { run: self.plan.run.clone(), sender }.into())
            }
        }
    }

    /// Finds the run at the broker, or begins it. Returns its mark.
    async fn find_or_begin(&mut self, connection: &Connection, marker: &Marker) -> Outcome<Mark> {
        let Self { target, names, plan, images, .. } = self;
        let look = mark::look(connection, names).await?;
        if let Some(unsent) = &self.unsent {
            return match look {
                Look::Found(mark) if mark.nonce == unsent.mark.nonce => Ok(unsent.mark.clone()),
                Look::Empty => self.rewrite(connection, marker).await,
                // Collected before the mark could say that all jobs were sent.
                Look::Missing if unsent.is_done() => {
                    Ok(Mark { sent: unsent.mark.jobs, ..unsent.mark.clone() })
                }
                _ => Err(self.gone().into()),
            };
        }
        let digest = plan.digest(images);
        let mark = match look {
            Look::Found(mark) if mark.digest == digest => {
                let mark = Mark { sender: target.sender.to_owned(), ..mark };
                if mark.sent < mark.jobs {
                    write(connection, marker, &mark).await?;
                }
                mark
            }
            Look::Found(Mark { run, sent, jobs, .. }) => {
                return Err(EnqueueError::Other { run, sent, jobs }.into());
            }
            Look::Unreadable => {
                let (run, queue) = (plan.run.clone(), names.mark.clone());
                return Err(EnqueueError::from(MarkError::Unreadable { run, queue }).into());
            }
            // A sender that was killed in between leaves an empty queue. It had sent nothing.
            Look::Missing | Look::Empty => {
                if let Some(last) = registry::last_of(target.options, target.first, &plan.run).await
                {
                    tracing::warn!(
                        run = plan.run,
                        begun = last.at,
                        jobs = last.jobs,
                        "the last run with this id was collected or deleted; beginning it again, with all its jobs"
                    );
                }
                marker.declare().await?;
                let mark = Mark {
                    run: plan.run.clone(),
                    nonce: new_nonce(),
                    jobs: plan.jobs(images.len()),
                    images: images.len(),
                    sent: 0,
                    digest,
                    sender: target.sender.to_owned(),
                };
                write(connection, marker, &mark).await?;
                mark
            }
        };
        let unsent = Unsent::new(plan, mark.clone(), images).map_err(EnqueueError::from)?;
        self.unsent = Some(unsent);
        Ok(mark)
    }

    /// Writes the mark again, which is missing from its queue.
    async fn rewrite(&self, connection: &Connection, marker: &Marker) -> Outcome<Mark> {
        let Some(Unsent { mark, .. }) = &self.unsent else { return Err(self.gone().into()) };
        write(connection, marker, mark).await?;
        Ok(mark.clone())
    }

    fn gone(&self) -> EnqueueError {
        let (run, jobs) = (self.plan.run.clone(), self.plan.jobs(self.images.len()));
        EnqueueError::Gone { run, sent: self.sent(), jobs }
    }

    /// Puts the run on the list of runs, before its first job.
    async fn list(&mut self, connection: &Connection, mark: &Mark) -> Outcome<()> {
        if self.is_listed || mark.sent > 0 {
            return Ok(());
        }
        let Self { target, plan, .. } = self;
        let begun = Begun {
            run: plan.run.clone(),
            nonce: mark.nonce.clone(),
            jobs: mark.jobs,
            images: mark.images,
            classes: plan.classes.to_string(),
            queue: target.topology.jobs.clone(),
            at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        };
        let channel = answer(connection.create_channel()).await?;
        if !registry::add(&channel, target.first, &begun).await? {
            return Err(Failed::Connection("the broker refused the list of runs".into()));
        }
        answer(channel.close(200, "done".into())).await?;
        self.is_listed = true;
        Ok(())
    }

    /// Sends batch after batch.
    async fn send(&mut self, link: &mut Link<'_>, progress: &mut Instant) -> Outcome<()> {
        let mut backoff = Backoff::default();
        while let Some(room) = self.room(link, progress).await? {
            let Some(unsent) = &mut self.unsent else { break };
            let waiting = Waiting { stop: self.stop, patience: self.plan.patience, progress };
            let batch = unsent.batch(room)?;
            let published = batch.len();
            if published == 0 {
                break;
            }
            let queue = &self.target.topology.jobs;
            let Answers::Refused(refused) = link.publish(queue, batch, waiting).await? else {
                // What is confirmed is marked, as far as that succeeds.
                let _ = self.mark(link).await;
                return Err(self.returned(link).await);
            };
            unsent.answered(published, &refused);
            let accepted = (published - refused.len()) as u64;
            link.looked = link.looked.map(|(at, room)| (at, room.saturating_sub(accepted)));
            if accepted > 0 {
                *progress = Instant::now();
                backoff.reset();
                let sent = Step::Sent(self.sent());
                (self.seen)(sent);
            }
            match refused.is_empty() {
                false => self.refused(link, progress, &mut backoff).await?,
                true if link.marked.elapsed() >= MARK => self.mark(link).await?,
                true => {}
            }
        }
        self.mark(link).await
    }

    /// Tells why the broker returned jobs as unroutable. It does so too while the queue's leader changes, or
    /// its node is down.
    async fn returned(&self, link: &Link<'_>) -> Failed<EnqueueError> {
        let queue = &self.target.topology.jobs;
        match look_at(link.connection, queue).await {
            Ok(None) => self.unsent(Obstacle::NoQueue(queue.clone())).into(),
            Ok(Some(_)) => Failed::Connection(
                format!("the broker returned jobs, although queue {queue} exists").into(),
            ),
            Err(error) => error.into(),
        }
    }

    /// Waits before what the broker refused is published again; an error if that has gone on for too
    /// long.
    async fn refused(
        &mut self,
        link: &mut Link<'_>,
        progress: &Instant,
        backoff: &mut Backoff,
    ) -> Outcome<()> {
        let patience = self.plan.patience;
        if progress.elapsed() >= patience {
            let _ = self.mark(link).await;
            let queue = self.target.topology.jobs.clone();
            let why = Obstacle::Refused { queue, seconds: patience.as_secs() };
            return Err(self.unsent(why).into());
        }
        self.mark(link).await?;
        (self.seen)(Step::Refused);
        if !self.has_warned {
            self.has_warned = true; // A queue that stays full refuses again and again.
            tracing::warn!(
                queue = self.target.topology.jobs,
                "the queue refuses jobs (it is full, or has no leader); sending them again until it accepts them"
            );
        }
        // After a change of leader RabbitMQ 3.10 refuses whatever an old channel publishes.
        link.jobs = confirming(link.connection).await?;
        let left = patience.saturating_sub(progress.elapsed());
        tokio::select! {
            () = sleep(backoff.pause().min(left)) => {}
            () = self.stop.cancelled() => {}
        }
        Ok(())
    }

    /// Waits until the jobs queue is short enough, and returns for how many jobs there is room;
    /// `None` if no more are to be sent.
    async fn room(&mut self, link: &mut Link<'_>, progress: &mut Instant) -> Outcome<Option<u64>> {
        loop {
            if self.stop.is_cancelled() || self.unsent.as_ref().is_none_or(Unsent::is_done) {
                return Ok(None);
            }
            if let Some((at, room @ 1..)) = link.looked
                && at.elapsed() < LOOK
            {
                return Ok(Some(room));
            }
            let waiting = Waiting { stop: self.stop, patience: self.plan.patience, progress };
            let asking = link.queues.ask_cancelled(&link.asking);
            if waiting.answer(link.connection, asking).await? {
                (self.seen)(Step::Cancelled);
                return Ok(None);
            }
            let Some(most) = self.plan.max_queued else {
                link.looked = Some((Instant::now(), u64::MAX));
                continue;
            };
            let queued = look_at(link.connection, &self.target.topology.jobs).await?;
            let queued = queued.map_or(0, |queue| queue.ready);
            let room = most.saturating_sub(queued);
            link.looked = Some((Instant::now(), room));
            if room == 0 {
                *progress = Instant::now();
                self.mark(link).await?;
                (self.seen)(Step::Full { queued });
                tokio::select! {
                    () = sleep(LOOK) => {}
                    () = self.stop.cancelled() => {}
                }
            }
        }
    }

    /// Marks what is confirmed.
    async fn mark(&mut self, link: &mut Link<'_>) -> Outcome<()> {
        let Some(unsent) = &mut self.unsent else { return Ok(()) };
        let sent = unsent.first();
        if sent <= unsent.mark.sent {
            return Ok(());
        }
        let mark = Mark { sent, ..unsent.mark.clone() };
        match link.marker.write(link.connection, &mark).await? {
            Written::Kept => {
                (unsent.mark, link.marked) = (mark, Instant::now());
                Ok(())
            }
            Written::Refused => Err(mark_refused()),
            // The results of all jobs were collected already.
            Written::Gone if unsent.is_done() => Ok(()),
            Written::Gone => Err(self.gone().into()),
        }
    }
}

/// Writes a mark that must be there.
async fn write(connection: &Connection, marker: &Marker, mark: &Mark) -> Outcome<()> {
    match marker.write(connection, mark).await? {
        Written::Kept => Ok(()),
        Written::Refused => Err(mark_refused()),
        Written::Gone => Err(Failed::Connection("the run's mark was deleted".into())),
    }
}

fn mark_refused() -> Failed<EnqueueError> {
    Failed::Connection("the broker refused the run's mark".into())
}
