//! Whether the collector takes traces, if one is named.

use angler_wire::text::chain;

use super::report::Check;
use crate::config::{TelemetrySettings, redacted};
use crate::telemetry::otlp;

const NAME: &str = "telemetry.otlp_endpoint";

pub(super) async fn check(settings: &TelemetrySettings) -> Check {
    let endpoint = &settings.otlp_endpoint;
    if endpoint.is_empty() {
        return Check::ok(NAME, "is empty: no traces");
    }
    let endpoint = redacted(endpoint);
    match otlp::ask(settings).await {
        Ok(()) => Check::ok(NAME, format!("{endpoint} takes traces")),
        // Workers work without it.
        Err(error) => Check::warning(
            NAME,
            format!("{endpoint} takes no traces: {}", chain(error.as_ref())),
            "Name a collector's receiver of OTLP over HTTP, mostly on port 4318 (4317 is gRPC), or leave it \
             empty. What it wants to see may stand in OTEL_EXPORTER_OTLP_HEADERS.",
        ),
    }
}
