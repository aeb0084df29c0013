//! A collector of traces, as the OTLP specification has it: protobuf, POSTed to `/v1/traces`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use prost::Message;
use tokio_util::task::AbortOnDropHandle;

/// What it does with what it is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mood {
    Takes,
    Refuses,
    /// Answers never.
    Hangs,
}

/// A span as it came.
#[derive(Debug, Clone)]
pub struct Span {
    pub name: String,
    pub trace_id: String,
    pub id: String,
    pub parent: String,
    pub kind: i32,
    pub nanos: (u64, u64),
    pub attributes: BTreeMap<String, String>,
    /// Trace and span.
    pub links: Vec<(String, String)>,
    /// The description of an error's status.
    pub error: Option<String>,
    /// Of the process.
    pub resource: BTreeMap<String, String>,
}

impl Span {
    pub fn attribute(&self, key: &str) -> &str {
        self.attributes.get(key).unwrap_or_else(|| panic!("no {key}: {self:?}"))
    }
}

struct Shared {
    mood: Mutex<Mood>,
    spans: Mutex<Vec<Span>>,
    headers: Mutex<Vec<HeaderMap>>,
}

/// Listens on a free port until it is dropped.
pub struct Collector {
    shared: Arc<Shared>,
    pub url: String,
    _serving: AbortOnDropHandle<()>,
}

impl Collector {
    pub async fn new(mood: Mood) -> Self {
        Self::at("127.0.0.1:0", mood).await
    }

    pub async fn at(address: &str, mood: Mood) -> Self {
        let shared = Arc::new(Shared {
            mood: Mutex::new(mood),
            spans: Mutex::default(),
            headers: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().route("/v1/traces", post(take)).with_state(Arc::clone(&shared));
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { shared, url, _serving: AbortOnDropHandle::new(serving) }
    }

    pub fn turns(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap() = mood;
    }

    /// How often it was asked.
    pub fn requests(&self) -> usize {
        self.shared.headers.lock().unwrap().len()
    }

    pub fn headers(&self) -> HeaderMap {
        self.shared.headers.lock().unwrap().first().cloned().unwrap()
    }

    /// What came until now.
    pub fn spans(&self) -> Vec<Span> {
        self.shared.spans.lock().unwrap().clone()
    }
}

async fn take(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Vec<u8>, StatusCode> {
    shared.headers.lock().unwrap().push(headers);
    let mood = *shared.mood.lock().unwrap();
    match mood {
        Mood::Hangs => std::future::pending().await,
        Mood::Refuses => return Err(StatusCode::SERVICE_UNAVAILABLE),
        Mood::Takes => {}
    }
    let request = ExportTraceServiceRequest::decode(body).map_err(|_| StatusCode::BAD_REQUEST)?;
    let mut spans = shared.spans.lock().unwrap();
    for group in request.resource_spans {
        let resource = attributes(group.resource.unwrap_or_default().attributes);
        for span in group.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            spans.push(Span {
                name: span.name,
                trace_id: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                kind: span.kind,
                nanos: (span.start_time_unix_nano, span.end_time_unix_nano),
                attributes: attributes(span.attributes),
                links: span.links.iter().map(|l| (hex(&l.trace_id), hex(&l.span_id))).collect(),
                error: span.status.filter(|s| s.code == 2).map(|s| s.message),
                resource: resource.clone(),
            });
        }
    }
    Ok(ExportTraceServiceResponse::default().encode_to_vec())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attributes(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value: Option<AnyValue>| match value.and_then(|v| v.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(truth)) => truth.to_string(),
        other => format!("{other:?}"),
    };
    attributes.into_iter().map(|a| (a.key, text(a.value))).collect()
}
