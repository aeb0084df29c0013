//! `/metrics`: what is recorded, and what is looked at only when somebody asks, in Prometheus' text
//! format.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::Collector;
use prometheus::{Counter, Gauge, GaugeVec, IntCounterVec, Opts, Registry, TextEncoder};
use strum::VariantArray;

use angler_core::outage_detector::Cause;
use angler_wire::control::SetStatus;

use super::{Shown, locked, process};

/// Sets that are named; all others count together, so that jobs cannot make up labels without end.
const NAMED: usize = 100;
/// The name of those others.
const OTHER: &str = "other";

/// The sets that have a name in metrics: the first that were seen, for as long as the process lives.
#[derive(Default)]
pub(super) struct Named(BTreeSet<String>);

impl Named {
    /// The set's own name, or that of all others.
    fn label<'a>(&mut self, set: &'a str) -> &'a str {
        if self.0.len() < NAMED && !self.0.contains(set) {
            self.0.insert(set.to_owned());
        }
        if self.0.contains(set) { set } else { OTHER }
    }
}

/// All metrics of a worker.
pub(super) fn text(shown: &Shown) -> String {
    let mut families = shown.readiness.metrics().gather();
    match looked_at(shown) {
        Ok(registry) => families.extend(registry.gather()),
        // Not reached: the names are constants.
        Err(error) => tracing::error!("some metrics cannot be exposed: {error}"),
    }
    families.sort_by(|a, b| a.name().cmp(b.name()));
    TextEncoder::new().encode_to_string(&families).unwrap_or_else(|error| {
        tracing::error!("metrics cannot be written: {error}");
        String::new()
    })
}

/// Made anew for each look.
fn looked_at(shown: &Shown) -> prometheus::Result<Registry> {
    let look = Look(Registry::new());
    let readiness = &shown.readiness;
    let state = |is: bool| f64::from(u8::from(is));
    let trouble = readiness.store_trouble();
    for (name, help, value) in [
        ("angler_ready", "1 while /readyz is green.", readiness.missing().is_none()),
        ("angler_stalled", "1 while /livez is red.", readiness.stalled().is_some()),
        ("angler_broker_blocked", "1 while the broker takes no results.", readiness.is_blocked()),
        ("angler_store_away", "1 while the store cannot be used.", trouble.is_some()),
    ] {
        look.gauge(name, help, state(value))?;
    }
    let help = "1 for the cause for which the store cannot be used.";
    let outage = look.kept(GaugeVec::new(Opts::new("angler_store_outage", help), &["cause"]))?;
    for &cause in Cause::VARIANTS {
        let is = trouble.as_ref().is_some_and(|trouble| trouble.cause == cause);
        outage.get_metric_with_label_values(&[cause.as_str()])?.set(state(is));
    }
    if let Some(connected) = readiness.connected() {
        let help = "1 while the connection that jobs come over is there.";
        look.gauge("angler_broker_connected", help, state(connected))?;
    }
    look.info("angler_build_info", "angler's version.", &[("version", env!("CARGO_PKG_VERSION"))])?;
    backend(shown, &look)?;
    let sets = readiness.catalog().map(|catalog| catalog.status()).unwrap_or_default();
    classes(&sets, &mut locked(&shown.sets), &look)?;
    own(shown, &look)?;
    Ok(look.0)
}

fn backend(shown: &Shown, look: &Look) -> prometheus::Result<()> {
    let (Some(pipeline), Some(about)) = (shown.readiness.pipeline(), shown.readiness.about())
    else {
        return Ok(()); // The model is not loaded yet.
    };
    let engine = pipeline.engine();
    let info = look.kept(GaugeVec::new(
        Opts::new("angler_backend_info", "What executes the model."),
        &["backend", "device", "model", "scoring"],
    ))?;
    let scoring = if engine.class_memories().is_empty() { "host" } else { "graph" };
    for device in engine.devices() {
        let values = [engine.backend().as_str(), device, &about.model, scoring];
        info.get_metric_with_label_values(&values)?.set(1.0);
    }
    let sessions = engine.sessions() as f64;
    look.gauge("angler_sessions", "Sessions of the model that work.", sessions)
}

fn classes(sets: &[SetStatus], named: &mut Named, look: &Look) -> prometheus::Result<()> {
    let gauges = |name: &str, help: &str, labels: &[&str]| {
        look.kept(GaugeVec::new(Opts::new(name, help), labels))
    };
    let versions = gauges(
        "angler_class_version_info",
        "The version that is served of each class set.",
        &["set", "version"],
    )?;
    let since = gauges(
        "angler_class_swap_timestamp_seconds",
        "When the version that is served of a class set began to be.",
        &["set"],
    )?;
    let refused = gauges(
        "angler_class_refused",
        "1 while the active version of a class set cannot be served, and the one before is.",
        &["set"],
    )?;
    let swaps = look.kept(IntCounterVec::new(
        Opts::new(
            "angler_class_swaps_total",
            "Versions that replaced another, and versions that were refused.",
        ),
        &["set", "outcome"],
    ))?;
    for status in sets {
        let set = named.label(&status.set);
        for (outcome, count) in [("served", status.swaps), ("refused", status.refusals)] {
            swaps.get_metric_with_label_values(&[set, outcome])?.inc_by(count);
        }
        if set == OTHER {
            continue;
        }
        versions.get_metric_with_label_values(&[set, &status.version])?.set(1.0);
        refused
            .get_metric_with_label_values(&[set])?
            .set(f64::from(u8::from(status.refused.is_some())));
        if let Ok(began) = humantime::parse_rfc3339(&status.since) {
            since.get_metric_with_label_values(&[set])?.set(unix(began));
        }
    }
    Ok(())
}

/// The process itself, under the names that every exporter has for it.
fn own(shown: &Shown, look: &Look) -> prometheus::Result<()> {
    let started = unix(shown.readiness.metrics().started());
    let help = "When the process started, in Unix time.";
    look.gauge("process_start_time_seconds", help, started)?;
    if let Some(bytes) = process::resident_bytes() {
        look.gauge("process_resident_memory_bytes", "Resident memory.", bytes)?;
    }
    if let Some(seconds) = process::cpu_seconds() {
        let help = "User and system CPU time.";
        look.kept(Counter::new("process_cpu_seconds_total", help))?.inc_by(seconds);
    }
    Ok(())
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Metrics with their values of now.
struct Look(Registry);

impl Look {
    fn kept<C: Collector + Clone + 'static>(
        &self,
        made: prometheus::Result<C>,
    ) -> prometheus::Result<C> {
        let metric = made?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn gauge(&self, name: &str, help: &str, value: f64) -> prometheus::Result<()> {
        self.kept(Gauge::new(name, help))?.set(value);
        Ok(())
    }

    fn info(&self, name: &str, help: &str, labels: &[(&str, &str)]) -> prometheus::Result<()> {
        let names: Vec<&str> = labels.iter().map(|(name, _)| *name).collect();
        let values: Vec<&str> = labels.iter().map(|(_, value)| *value).collect();
        let info = self.kept(GaugeVec::new(Opts::new(name, help), &names))?;
        info.get_metric_with_label_values(&values)?.set(1.0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(number: usize) -> SetStatus {
        SetStatus {
            set: format!("set-{number}"),
            version: format!("v{number}"),
            sha256: String::new(),
            rows: 1,
            bytes: 1,
            since: "2026-01-31T12:00:00.000Z".into(),
            swaps: 2,
            refusals: 1,
            refused: None,
        }
    }

    #[test]
    fn sets_beyond_the_first_hundred_count_together() {
        let mut named = Named::default();
        let mut sets: Vec<SetStatus> = (50..150).map(set).collect();
        classes(&sets, &mut named, &Look(Registry::new())).unwrap();
        // Others come, which sort before them.
        sets.extend((0..50).map(set));
        sets.sort_by(|a, b| a.set.cmp(&b.set));
        let look = Look(Registry::new());
        classes(&sets, &mut named, &look).unwrap();
        let text = TextEncoder::new().encode_to_string(&look.0.gather()).unwrap();
        let count = |start: &str| text.lines().filter(|line| line.starts_with(start)).count();
        assert_eq!(count("angler_class_version_info{"), 100);
        assert_eq!(count("angler_class_swaps_total{"), 202);
        let other = "angler_class_swaps_total{outcome=\"served\",set=\"other\"} 100";
        assert!(text.lines().any(|line| line == other), "{text}");
        let began = "angler_class_swap_timestamp_seconds{set=\"set-149\"} 1769860800";
        assert!(text.lines().any(|line| line == began), "{text}");
    }
}
