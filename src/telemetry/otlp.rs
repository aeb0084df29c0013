//! Spans to an OpenTelemetry collector: OTLP as protobuf over HTTP
//! (<https://opentelemetry.io/docs/specs/otlp/#otlphttp>).
//!
//! A thread of the SDK takes spans from a bounded queue; who ends a span never waits, and what the
//! queue cannot hold is dropped. A collector that is away costs one warning, and one line when it is
//! back.

use std::error::Error;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, anyhow};
use async_trait::async_trait;
use bytes::Bytes;
use hyper_rustls::HttpsConnectorBuilder;
use opentelemetry::global::BoxedTracer;
use opentelemetry::trace::{Link, SpanKind, TraceId, TracerProvider};
use opentelemetry::{Context, InstrumentationScope, KeyValue};
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchSpanProcessor, Sampler, SamplingResult, SdkTracerProvider, ShouldSample, SpanExporter as _,
};
use tokio::runtime::Handle;

use angler_metrics::trace::Traces;
use angler_tls::COLLECTOR;

use crate::config::{TelemetrySettings, redacted};

/// One request's time, tries included. What is to be sent at the end of the process has as much.
const DEADLINE: Duration = Duration::from_secs(3);
/// Where a collector takes spans, below its address.
const PATH: &str = "/v1/traces";

/// What tells this process from others.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The worker's name.
    pub worker: String,
    /// Fingerprint of its model.
    pub model: String,
}

impl Identity {
    /// Workers on one host have one name.
    fn instance(&self) -> String {
        format!("{}/{}", self.worker, std::process::id())
    }
}

/// The way to a collector.
pub struct Otlp {
    provider: SdkTracerProvider,
    traces: Arc<Traces>,
}

impl Otlp {
    /// Starts to send by these settings; none if they name no collector. Must be called inside a
    /// runtime, which makes the requests. Nothing is asked of the collector yet.
    ///
    /// # Errors
    /// If `telemetry.ca_file` cannot be used, or the environment's `OTEL_EXPORTER_OTLP_*` ask for
    /// what is not there (a compression).
    pub fn start(settings: &TelemetrySettings, identity: &Identity) -> Result<Option<Self>> {
        if settings.otlp_endpoint.is_empty() {
            return Ok(None);
        }
        let (exporter, _) = exporter(settings)?;
        let resource = Resource::builder()
            .with_service_name(settings.service_name.clone())
            .with_attributes([
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("service.instance.id", identity.instance()),
                KeyValue::new("angler.model", identity.model.clone()),
            ])
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).build())
            .with_sampler(Sampler::parent_based(Roots(Sampler::TraceIdRatioBased(
                settings.otlp_sample,
            ))))
            .with_resource(resource)
            .build();
        let scope =
            InstrumentationScope::builder("angler").with_version(env!("CARGO_PKG_VERSION")).build();
        let tracer = BoxedTracer::new(Box::new(provider.tracer_with_scope(scope)));
        let traces = Arc::new(Traces::new(tracer));
        tracing::info!(
            collector = redacted(&address(&settings.otlp_endpoint)),
            sample = settings.otlp_sample,
            "sending traces"
        );
        Ok(Some(Self { provider, traces }))
    }

    /// Makes the spans that are sent.
    pub fn traces(&self) -> Arc<Traces> {
        Arc::clone(&self.traces)
    }

    /// Sends what is left, for a few seconds at most.
    pub async fn close(self) {
        let provider = self.provider;
        let closing = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(DEADLINE));
        // A collector that does not answer was warned of.
        let _ = closing.await;
    }
}

/// Asks the collector to take no spans at all, as it would be asked to take some.
///
/// # Errors
/// What is wrong with it.
pub async fn ask(settings: &TelemetrySettings) -> Result<()> {
    let (exporter, state) = exporter(settings)?;
    let runtime = Handle::current();
    // Between tries it blocks.
    let asked =
        tokio::task::spawn_blocking(move || runtime.block_on(exporter.export(Vec::new()))).await;
    match asked {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(state.reason().map_or_else(|| error.into(), anyhow::Error::msg)),
        Err(panic) => Err(panic.into()),
    }
}

fn exporter(settings: &TelemetrySettings) -> Result<(SpanExporter, Arc<State>)> {
    let collector = Collector::new(settings)?;
    let state = Arc::clone(&collector.state);
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(collector)
        .with_endpoint(address(&settings.otlp_endpoint))
        .with_timeout(DEADLINE)
        .build()
        // Its own words quote the address, which may hold a password.
        .map_err(|_| {
            let shown = redacted(&settings.otlp_endpoint);
            anyhow!("telemetry.otlp_endpoint = {shown:?} is no URL that a collector can have")
        })?;
    Ok((exporter, state))
}

/// Where spans go: the address of the settings is the collector's, as `OTEL_EXPORTER_OTLP_ENDPOINT`
/// is, or already that of its traces.
fn address(endpoint: &str) -> String {
    let endpoint = endpoint.trim_end_matches('/');
    if endpoint.ends_with(PATH) { endpoint.to_owned() } else { format!("{endpoint}{PATH}") }
}

/// Which spans without a parent are sent: a batch's if one of its jobs' is, others by chance.
#[derive(Debug, Clone)]
struct Roots(Sampler);

impl ShouldSample for Roots {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let linked = links.iter().any(|link| link.span_context.is_sampled());
        let sampler = if linked { &Sampler::AlwaysOn } else { &self.0 };
        sampler.should_sample(parent, trace, name, kind, attributes, links)
    }
}

/// Makes the requests, and says once when they begin to fail.
struct Collector {
    client: HyperClient<hyper_rustls::HttpsConnector<HttpConnector>>,
    /// The thread that exports has no runtime of its own.
    runtime: Handle,
    state: Arc<State>,
}

/// Whether requests fail, and why they began to.
struct State {
    address: String,
    failing: Mutex<Option<String>>,
}

impl State {
    fn reason(&self) -> Option<String> {
        self.failing().clone()
    }

    fn failed(&self, reason: &str) {
        let mut failing = self.failing();
        if failing.is_none() {
            *failing = Some(reason.to_owned());
            tracing::warn!(
                collector = self.address,
                "traces cannot be sent and are dropped meanwhile: {reason}"
            );
        }
    }

    fn succeeded(&self) {
        if self.failing().take().is_some() {
            tracing::info!(collector = self.address, "traces are sent again");
        }
    }

    fn failing(&self) -> MutexGuard<'_, Option<String>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type HttpConnector = hyper_util::client::legacy::connect::HttpConnector;

impl Collector {
    fn new(settings: &TelemetrySettings) -> Result<Self> {
        let ca_file = (!settings.ca_file.is_empty()).then_some(settings.ca_file.as_ref());
        let tls = COLLECTOR.client_config(ca_file, None)?;
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        Ok(Self {
            client: HyperClient::new(connector.build(), DEADLINE, None),
            runtime: Handle::current(),
            state: Arc::new(State {
                address: redacted(&address(&settings.otlp_endpoint)),
                failing: Mutex::default(),
            }),
        })
    }
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").field("address", &self.state.address).finish_non_exhaustive()
    }
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        let sent = self.runtime.spawn(async move { client.send_bytes(request).await });
        let answer = sent.await?.inspect_err(|e| self.state.failed(&reason(e.as_ref())))?;
        if answer.status().is_success() {
            self.state.succeeded();
        } else {
            self.state.failed(&format!("it answers {}", answer.status()));
        }
        Ok(answer)
    }
}

/// The last cause says most: the first is "client error (Connect)".
fn reason(error: &(dyn Error + 'static)) -> String {
    if error.is::<tokio::time::error::Elapsed>() {
        return format!("it did not answer within {} s", DEADLINE.as_secs());
    }
    COLLECTOR.explain(error).map(|explained| explained.to_string()).unwrap_or_else(|| {
        let mut last = error;
        while let Some(cause) = last.source() {
            last = cause;
        }
        last.to_string()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_the_collectors_or_that_of_its_traces() {
        for (given, wanted) in [
            ("http://c:4318", "http://c:4318/v1/traces"),
            ("http://c:4318/", "http://c:4318/v1/traces"),
            ("https://c/otlp", "https://c/otlp/v1/traces"),
            ("https://c/v1/traces", "https://c/v1/traces"),
        ] {
            assert_eq!(address(given), wanted);
        }
    }
}
