//! A job, as others see it: a number of the metrics, a span, fields of log lines.

use std::sync::Arc;

use angler_metrics::trace::{JobFacts, JobTrace, Step, Traces};
use angler_metrics::{JobEnd, JobInFlight};
use angler_wire::job::Run;

use super::core::Core;
use crate::source::{Delivery, Settlement};

/// From a job's receipt to its settlement, however it ends.
pub(super) struct JobTracking {
    /// The job's id.
    pub id: String,
    /// Its run's, if it belongs to one.
    pub run: Option<String>,
    in_flight: JobInFlight,
    trace: Option<JobTrace>,
}

impl JobTracking {
    pub fn begin(core: &Core, delivery: &Delivery) -> Self {
        let (id, run) = match &delivery.job {
            Ok(job) => (&job.id, &job.run),
            Err(unworkable) => (&unworkable.id, &unworkable.run),
        };
        let Delivery { job, attempt, suspect, queue, reply, .. } = delivery;
        let run = run.as_ref().map(Run::shown);
        let trace = |traces: &Arc<Traces>| {
            traces.job(&JobFacts {
                id,
                run: run.as_deref(),
                queue,
                attempt: *attempt,
                suspect: *suspect,
                correlation_id: reply.correlation_id.as_deref(),
                images: job.as_ref().ok().map(|job| job.images.len()),
                traceparent: reply.traceparent.as_deref(),
            })
        };
        Self {
            id: id.clone(),
            in_flight: core.metrics().job(),
            trace: core.options.traces.as_ref().map(trace),
            run,
        }
    }

    /// The trace that the job belongs to, for log lines.
    pub fn trace_id(&self) -> Option<String> {
        self.trace.as_ref().map(JobTrace::trace_id)
    }

    /// What the job's batches are linked to.
    pub fn sent_trace(&self) -> Option<JobTrace> {
        self.trace.clone().filter(JobTrace::is_sampled)
    }

    /// A part of its course begins, and ends when the guard is dropped.
    pub fn step(&self, name: &'static str) -> Option<Step> {
        self.trace.as_ref().map(|trace| trace.step(name))
    }

    /// It was scored against a version, and so many of its images failed.
    pub fn scored(&self, classes: &str, failed: usize) {
        if let Some(trace) = &self.trace {
            trace.scored(classes, failed);
        }
    }

    /// It, or this attempt at it, failed.
    pub fn failed(&self, code: &'static str, reason: &str) {
        if let Some(trace) = &self.trace {
            trace.failed(code, reason);
        }
    }

    /// Its delivery was settled so.
    ///
    /// * `failed`: whether its result says that the whole job failed.
    pub fn settled(&self, settlement: &Settlement, failed: bool) {
        self.end(self.in_flight.ended(match settlement {
            Settlement::Ack if failed => JobEnd::Failed,
            Settlement::Ack => JobEnd::Done,
            Settlement::DeadLetter(failure) => JobEnd::DeadLettered(failure.code),
            Settlement::Retry { .. } => JobEnd::Retried,
            Settlement::Requeue => JobEnd::Requeued,
        }));
    }

    /// Its delivery is gone with its connection.
    pub fn lost(&self) {
        self.end(self.in_flight.ended(JobEnd::Lost));
    }

    fn end(&self, outcome: &'static str) {
        if let Some(trace) = &self.trace {
            trace.end(outcome);
        }
    }
}

impl Drop for JobTracking {
    /// A drain that took too long, or an engine that broke: the delivery comes back. Of a span that
    /// has ended nothing changes.
    fn drop(&mut self) {
        self.end("abandoned");
    }
}
