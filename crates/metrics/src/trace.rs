//! Traces: a span a job, which continues its producer's, and a span a batch, linked to its jobs.
//!
//! Written against OpenTelemetry's API alone: whether there are spans, and where they go, is said
//! where the parts are put together. A part that is given no [`Traces`] makes none and pays nothing.
//! docs/operations.md lists the names and attributes, which follow the semantic conventions for
//! messaging (<https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/>).

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use opentelemetry::global::{BoxedSpan, BoxedTracer};
use opentelemetry::trace::{
    Link, Span, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId,
    TraceState, Tracer,
};
use opentelemetry::{Context, KeyValue};

use crate::CloseReason;

/// Makes spans.
pub struct Traces {
    tracer: BoxedTracer,
}

impl Traces {
    /// Spans of this tracer.
    pub fn new(tracer: BoxedTracer) -> Self {
        Self { tracer }
    }

    /// A job was received. A `traceparent` that cannot be read begins a trace, as W3C Trace Context
    /// demands (<https://www.w3.org/TR/trace-context/#a-traceparent-is-received>).
    pub fn job(self: &Arc<Self>, facts: &JobFacts<'_>) -> JobTrace {
        let queue = facts.queue;
        let mut attributes = vec![
            KeyValue::new("messaging.system", "rabbitmq"),
            KeyValue::new("messaging.operation.type", "process"),
            KeyValue::new("messaging.operation.name", "process"),
            KeyValue::new("messaging.destination.name", queue.to_owned()),
            KeyValue::new("messaging.message.id", facts.id.to_owned()),
            KeyValue::new("angler.job.attempt", i64::from(facts.attempt)),
            KeyValue::new("angler.job.suspect", facts.suspect),
        ];
        if let Some(id) = facts.correlation_id {
            attributes.push(KeyValue::new("messaging.message.conversation_id", id.to_owned()));
        }
        if let Some(run) = facts.run {
            attributes.push(KeyValue::new("angler.run.id", run.to_owned()));
        }
        if let Some(images) = facts.images {
            attributes.push(KeyValue::new("angler.job.images", count(images)));
        }
        let builder = self
            .tracer
            .span_builder(format!("process {queue}"))
            .with_kind(SpanKind::Consumer)
            .with_attributes(attributes);
        let parent = match facts.traceparent.and_then(parent) {
            Some(parent) => Context::new().with_remote_span_context(parent),
            None => Context::new(),
        };
        let span = self.tracer.build_with_context(builder, &parent);
        JobTrace(Arc::new(JobSpan {
            traces: Arc::clone(self),
            context: span.span_context().clone(),
            span: Mutex::new(span),
        }))
    }

    fn child(
        &self,
        of: &SpanContext,
        name: &'static str,
        began: SystemTime,
        attributes: Vec<KeyValue>,
    ) -> BoxedSpan {
        let builder = self.tracer.span_builder(name).with_start_time(began);
        let parent = Context::new().with_remote_span_context(of.clone());
        self.tracer.build_with_context(builder.with_attributes(attributes), &parent)
    }
}

/// What is known of a job when it is received.
#[derive(Debug, Clone, Copy)]
pub struct JobFacts<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its run, if it belongs to one.
    pub run: Option<&'a str>,
    /// The queue that it came from.
    pub queue: &'a str,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// Whether it is a suspect.
    pub suspect: bool,
    /// The producer's own correlation id.
    pub correlation_id: Option<&'a str>,
    /// How many images it has; `None` if the message is not a job.
    pub images: Option<usize>,
    /// Its producer's W3C trace context.
    pub traceparent: Option<&'a str>,
}

/// The span that a `traceparent` names, `00-<32 hex>-<16 hex>-<2 hex>` in lower case; of a later
/// version what is known of it (<https://www.w3.org/TR/trace-context/#traceparent-header>). None if
/// it is not one: the SDK's own reader takes identifiers of any length.
fn parent(traceparent: &str) -> Option<SpanContext> {
    let lower_hex = |part: &&str| part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let mut parts = traceparent.split('-');
    let mut part = |digits| parts.next().filter(|p| p.len() == digits).filter(lower_hex);
    let (version, trace, span, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
    if version == "ff" || version == "00" && parts.next().is_some() {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let context = SpanContext::new(trace, span, flags, true, TraceState::NONE);
    // Identifiers of nothing but zeros are none.
    context.is_valid().then_some(context)
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The span of a job. Clones share it.
#[derive(Clone)]
pub struct JobTrace(Arc<JobSpan>);

struct JobSpan {
    traces: Arc<Traces>,
    context: SpanContext,
    span: Mutex<BoxedSpan>,
}

impl fmt::Debug for JobTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("JobTrace").field(&self.0.context).finish()
    }
}

impl JobTrace {
    /// Whether anything of it is sent; its children and batches are else not worth making.
    pub fn is_sampled(&self) -> bool {
        self.0.context.is_sampled()
    }

    /// The trace that it belongs to, as 32 hexadecimal digits.
    pub fn trace_id(&self) -> String {
        self.0.context.trace_id().to_string()
    }

    /// A part of the job's course begins; it ends when the guard is dropped.
    pub fn step(&self, name: &'static str) -> Step {
        let JobSpan { traces, context, .. } = &*self.0;
        let step = || traces.child(context, name, SystemTime::now(), Vec::new());
        Step { _span: self.is_sampled().then(step) }
    }

    /// The job was scored against a version, and so many of its images failed.
    pub fn scored(&self, classes: &str, failed: usize) {
        self.span().set_attributes([
            KeyValue::new("angler.classes", classes.to_owned()),
            KeyValue::new("angler.job.images_failed", count(failed)),
        ]);
    }

    /// The job, or this attempt at it, failed.
    ///
    /// * `code`: what kind of failure, from a closed set.
    pub fn failed(&self, code: &'static str, reason: &str) {
        let mut span = self.span();
        span.set_attribute(KeyValue::new("error.type", code));
        span.set_status(Status::error(reason.to_owned()));
    }

    /// The job is over, as `angler_jobs_total` names it.
    pub fn end(&self, outcome: &'static str) {
        let mut span = self.span();
        span.set_attribute(KeyValue::new("angler.job.outcome", outcome));
        span.end();
    }

    fn span(&self) -> MutexGuard<'_, BoxedSpan> {
        self.0.span.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of a job's course.
pub struct Step {
    /// Ends when it is dropped.
    _span: Option<BoxedSpan>,
}

/// What is known of a batch when it comes to an embedder.
#[derive(Debug, Clone, Copy)]
pub struct BatchFacts {
    /// Images in it.
    pub images: usize,
    /// Why it closed; none: another embedder left it.
    pub closed: Option<CloseReason>,
    /// What executes it, as results name it.
    pub backend: &'static str,
    /// The number of the session.
    pub session: usize,
}

/// The span of a batch: a trace of its own, since no one job is its cause, with a link to each job
/// that has an image in it, and one back from each.
pub struct BatchTrace {
    traces: Arc<Traces>,
    span: BoxedSpan,
}

impl BatchTrace {
    /// A batch of images of these jobs begins; none if none of them is traced.
    pub fn begin<'a>(jobs: impl Iterator<Item = &'a JobTrace>, facts: BatchFacts) -> Option<Self> {
        let mut seen = HashSet::new();
        let distinct: Vec<_> = jobs.filter(|job| seen.insert(Arc::as_ptr(&job.0))).collect();
        let traces = Arc::clone(&distinct.first()?.0.traces);
        let links = distinct.iter().map(|job| Link::with_context(job.0.context.clone()));
        let mut attributes = vec![
            KeyValue::new("angler.batch.images", count(facts.images)),
            KeyValue::new("angler.batch.jobs", count(distinct.len())),
            KeyValue::new("angler.backend", facts.backend),
            KeyValue::new("angler.session", count(facts.session)),
        ];
        if let Some(reason) = facts.closed {
            attributes.push(KeyValue::new("angler.batch.close_reason", reason.as_str()));
        }
        // The exporter bounds the links of a span, and counts what is beyond.
        let builder = traces
            .tracer
            .span_builder("batch")
            .with_links(links.collect())
            .with_attributes(attributes);
        let span = traces.tracer.build_with_context(builder, &Context::new());
        for job in distinct {
            job.span().add_link(span.span_context().clone(), Vec::new());
        }
        Some(Self { traces, span })
    }

    /// So many of its images went through a step since then.
    pub fn step(&self, name: &'static str, began: SystemTime, images: usize, failed: Option<&str>) {
        let attributes = vec![KeyValue::new("angler.batch.images", count(images))];
        let mut step = self.traces.child(self.span.span_context(), name, began, attributes);
        if let Some(reason) = failed {
            step.set_status(Status::error(reason.to_owned()));
        }
    }

    /// The embedder broke on it; its images are left to others, or to other workers.
    pub fn broke(&mut self, reason: &str) {
        self.span.set_status(Status::error(reason.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    #[test]
    fn a_traceparent_is_read_as_the_standard_has_it() {
        for (text, sampled) in [
            (format!("00-{TRACE}-{SPAN}-01"), true),
            (format!("00-{TRACE}-{SPAN}-00"), false),
            // Flags that are not known yet, and a version that is not.
            (format!("00-{TRACE}-{SPAN}-03"), true),
            (format!("cc-{TRACE}-{SPAN}-01-what-comes"), true),
        ] {
            let context = parent(&text).unwrap();
            assert_eq!(context.trace_id().to_string(), TRACE);
            assert_eq!(context.span_id().to_string(), SPAN);
            assert!(context.is_remote() && context.is_sampled() == sampled, "{text}");
        }
        for text in [
            String::new(),
            "00-aa-bb-01".to_owned(),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("0-{TRACE}-{SPAN}-01"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-+{}-{SPAN}-01", &TRACE[1..]),
            format!("00-{TRACE}-{SPAN}-é"),
            format!("00 {TRACE} {SPAN} 01"),
        ] {
            assert!(parent(&text).is_none(), "{text:?}");
        }
    }
}
