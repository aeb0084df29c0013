//! Settings: documented defaults inside the binary, then a file, then the environment, then flags.
//!
//! Every layer is checked by the same types; an unknown key is an error in any of them.

mod lanes;
mod secrets;
mod urls;

use std::path::{Path, PathBuf};
use std::time::Duration;

use config::{Config, Environment, File, FileFormat};
use serde::Deserialize;

pub use crate::config::lanes::{Lane, Lanes};
pub use crate::config::secrets::{hidden, redacted};
pub use crate::config::urls::Urls;

use angler_amqp::AmqpOptions;
use angler_amqp::address::addresses;
use angler_amqp::topology::Topology;
use angler_core::class_sets::catalog::CatalogOptions;
use angler_core::pipeline::ImageLimits;
use angler_core::retry::RetrySchedule;
use angler_inference::embed;
use angler_inference::embed::onnxruntime::{ConvSearch, CudaOptions};
use angler_inference::embed::{BackendChoice, Scoring};
use angler_inference::engine::OnFailure;
use angler_inference::engine::policy::BatchPolicy;
use angler_storage::s3::S3Options;
use angler_vectors::score::Scorer;
use angler_wire::job::{ClassSelector, JobLimits};

/// The documented defaults.
pub const DEFAULTS: &str = include_str!("config.default.toml");

/// The settings file that is read if no other is named and it exists.
pub const DEFAULT_FILE: &str = "angler.toml";

/// Settings that cannot be used: wrong usage, exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("settings: {0}")]
pub struct SettingsError(String);

/// All settings; the meaning of each stands in `config.default.toml`.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // Documented in config.default.toml, which is what users read.
pub struct Settings {
    pub model: ModelSettings,
    pub embedder: EmbedderSettings,
    pub classes: ClassesSettings,
    pub amqp: AmqpSettings,
    pub s3: S3Settings,
    pub limits: LimitsSettings,
    pub retry: RetrySettings,
    pub http: HttpSettings,
    pub shutdown: ShutdownSettings,
    pub log: LogSettings,
    pub telemetry: TelemetrySettings,
}

macro_rules! section {
    ($(#[$meta:meta])* $name:ident { $($field:ident: $kind:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(missing_docs)] // Documented in config.default.toml, which is what users read.
        pub struct $name { $(pub $field: $kind,)* }
    };
}

section!(/** `[model]` */ ModelSettings { path: String, });
section!(/** `[embedder]` */ EmbedderSettings {
    backend: BackendChoice,
    devices: Vec<i32>,
    max_batch: usize,
    linger_ms: u64,
    threads: usize,
    sessions: usize,
    allow_fallback: bool,
    scoring: Scoring,
    graph_bytes: usize,
    tf32: bool,
    cudnn_search: ConvSearch,
    nhwc: bool,
    on_device_failure: OnFailure,
    onnxruntime_library: String,
});
section!(/** `[classes]` */ ClassesSettings {
    root: String,
    poll_seconds: f64,
    cache_bytes: usize,
    version_bytes: u64,
    preload: Vec<String>,
    shadow: String,
});
section!(/** `[amqp]` */ AmqpSettings {
    url: Urls,
    jobs_queue: Lanes,
    results_queue: String,
    dead_queue: String,
    control_exchange: String,
    prefetch: u16,
    blocked_seconds: f64,
    ca_file: String,
    client_cert_file: String,
    client_key_file: String,
    reply_to_allow: Vec<String>,
});
section!(/** `[s3]` */ S3Settings {
    endpoint: String,
    region: String,
    path_style: bool,
    allowed_buckets: Vec<String>,
    concurrency: usize,
    ca_file: String,
});
section!(/** `[limits]` */ LimitsSettings {
    images_per_job: usize,
    message_bytes: usize,
    image_bytes: u32,
    image_pixels: u64,
    images_in_flight: usize,
    bytes_in_flight: usize,
    decoders: usize,
    image_seconds: f64,
    job_seconds: f64,
    stall_seconds: f64,
});
section!(/** `[retry]` */ RetrySettings { delays_seconds: Vec<f64>, max_attempts: u32, });
section!(/** `[http]` */ HttpSettings { listen: String, });
section!(/** `[shutdown]` */ ShutdownSettings { grace_seconds: u64, });
section!(/** `[log]` */ LogSettings { level: String, format: LogFormat, });
section!(/** `[telemetry]` */ TelemetrySettings {
    otlp_endpoint: String,
    otlp_sample: f64,
    service_name: String,
    ca_file: String,
});

impl TelemetrySettings {
    fn check(&self) -> Result<(), SettingsError> {
        let Self { otlp_endpoint: endpoint, otlp_sample: sample, .. } = self;
        let rest = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
        // The characters of RFC 3986.
        let known = |c: char| c.is_ascii_alphanumeric() || "-._~:/?#[]@!$&'()*+,;=%".contains(c);
        let usable = rest.is_some_and(|rest| {
            !rest.is_empty() && !rest.starts_with(['/', ':']) && rest.chars().all(known)
        });
        if !endpoint.is_empty() && !usable {
            // What has no @ has no password.
            let shown = if endpoint.contains('@') { redacted(endpoint) } else { endpoint.clone() };
            return Err(SettingsError(format!(
                "telemetry.otlp_endpoint = {shown:?} must be http://HOST:PORT or https://HOST:PORT"
            )));
        }
        if !(0.0..=1.0).contains(sample) {
            return Err(SettingsError(format!(
                "telemetry.otlp_sample = {sample} must be between 0 and 1"
            )));
        }
        Ok(())
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Settings {
    /// Reads all layers. `file` is `--config`; `flags` are `key=value` pairs.
    ///
    /// # Errors
    /// [`SettingsError`], which names the key or the file.
    pub fn load(file: Option<&Path>, flags: &[(String, String)]) -> Result<Self, SettingsError> {
        let environment = Environment::with_prefix("ANGLER")
            .prefix_separator("__")
            .separator("__")
            .try_parsing(true)
            .list_separator(",")
            .ignore_empty(true);
        let environment = LISTS.iter().fold(environment, |e, key| e.with_list_parse_key(key));
        Self::layered(file, environment, flags)
    }

    fn layered(
        file: Option<&Path>,
        environment: Environment,
        flags: &[(String, String)],
    ) -> Result<Self, SettingsError> {
        let text = |e: config::ConfigError| SettingsError(secrets::told(&e));
        let mut builder = Config::builder().add_source(File::from_str(DEFAULTS, FileFormat::Toml));
        match file {
            Some(path) => builder = builder.add_source(File::from(path).format(FileFormat::Toml)),
            None => {
                let default = File::from(Path::new(DEFAULT_FILE)).format(FileFormat::Toml);
                builder = builder.add_source(default.required(false));
            }
        }
        builder = builder.add_source(environment);
        for (key, value) in flags {
            builder = builder.set_override(key, flag_value(key, value)).map_err(text)?;
        }
        let settings: Self = builder.build().and_then(Config::try_deserialize).map_err(text)?;
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<(), SettingsError> {
        let e = &self.embedder;
        let l = &self.limits;
        let positive = [
            ("embedder.max_batch", e.max_batch),
            ("amqp.prefetch", usize::from(self.amqp.prefetch)),
            ("s3.concurrency", self.s3.concurrency),
            ("limits.images_per_job", l.images_per_job),
            ("limits.message_bytes", l.message_bytes),
            ("limits.image_bytes", l.image_bytes as usize),
            ("limits.image_pixels", usize::try_from(l.image_pixels).unwrap_or(usize::MAX)),
            ("limits.images_in_flight", l.images_in_flight),
            ("retry.max_attempts", self.retry.max_attempts as usize),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(SettingsError(format!("{key} must be at least 1")));
        }
        if e.max_batch > 4096 {
            return Err(SettingsError("embedder.max_batch must be at most 4096".to_owned()));
        }
        if e.devices.iter().any(|device| *device < 0) {
            return Err(SettingsError("embedder.devices must be numbers from 0".to_owned()));
        }
        if l.bytes_in_flight < l.image_bytes as usize {
            return Err(SettingsError(format!(
                "limits.bytes_in_flight ({}) must be at least limits.image_bytes ({})",
                l.bytes_in_flight, l.image_bytes
            )));
        }
        let seconds = [
            ("limits.image_seconds", l.image_seconds),
            ("limits.job_seconds", l.job_seconds),
            ("limits.stall_seconds", l.stall_seconds),
            ("amqp.blocked_seconds", self.amqp.blocked_seconds),
        ];
        // A day is more than any deadline here can mean.
        let wrong = |s: f64, least: f64| !s.is_finite() || s < least || s > 86_400.0;
        if let Some((key, value)) = seconds.iter().find(|(_, s)| wrong(*s, 0.001)) {
            return Err(SettingsError(format!("{key} = {value} must be between 0.001 and 86400")));
        }
        if wrong(self.classes.poll_seconds, 0.1) {
            return Err(SettingsError("classes.poll_seconds must be 0.1 to 86400".to_owned()));
        }
        if self.retry.delays_seconds.iter().any(|s| wrong(*s, 0.001)) {
            return Err(SettingsError(
                "retry.delays_seconds must each be between 0.001 and 86400".to_owned(),
            ));
        }
        let a = &self.amqp;
        if a.client_cert_file.is_empty() != a.client_key_file.is_empty() {
            return Err(SettingsError(
                "amqp.client_cert_file and amqp.client_key_file belong together".to_owned(),
            ));
        }
        for (key, name) in [
            ("amqp.results_queue", &a.results_queue),
            ("amqp.dead_queue", &a.dead_queue),
            ("amqp.control_exchange", &a.control_exchange),
        ] {
            if !(1..=255).contains(&name.len()) {
                return Err(SettingsError(format!(
                    "{key} must have 1 to 255 bytes, not {}",
                    name.len()
                )));
            }
        }
        addresses(a.url.as_str()).map_err(|e| SettingsError(e.to_string()))?;
        self.telemetry.check()?;
        self.preload()?;
        self.shadow()?;
        Ok(())
    }

    /// `embedder.*`, as the back ends take it.
    pub fn embed_options(&self) -> embed::Options {
        let e = &self.embedder;
        embed::Options {
            choice: e.backend,
            devices: e.devices.clone(),
            threads: e.threads,
            sessions: e.sessions,
            max_batch: e.max_batch,
            allow_fallback: e.allow_fallback,
            scoring: e.scoring,
            graph_bytes: e.graph_bytes,
            cuda: CudaOptions { tf32: e.tf32, search: e.cudnn_search, nhwc: e.nhwc },
            onnxruntime_library: path(&e.onnxruntime_library),
        }
    }

    /// When batches close.
    pub fn batch_policy(&self) -> BatchPolicy {
        BatchPolicy {
            max_batch: self.embedder.max_batch,
            linger: Duration::from_millis(self.embedder.linger_ms),
        }
    }

    /// `limits.*` that concern images.
    pub fn image_limits(&self) -> ImageLimits {
        let l = &self.limits;
        let decoders = match l.decoders {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            some => some,
        };
        ImageLimits {
            image_bytes: l.image_bytes,
            image_pixels: l.image_pixels,
            images_in_flight: l.images_in_flight,
            // Every request and every decoder has an image, and the next batch forms.
            images_at_least: self.s3.concurrency + decoders + 2 * self.embedder.max_batch,
            bytes_in_flight: l.bytes_in_flight,
            image_time: Duration::from_secs_f64(l.image_seconds),
            wait_time: Duration::from_secs_f64(l.job_seconds),
            decoders,
        }
    }

    /// `limits.*` that concern messages.
    pub fn job_limits(&self) -> JobLimits {
        JobLimits { images: self.limits.images_per_job, message_bytes: self.limits.message_bytes }
    }

    /// `retry.*`
    pub fn retry_schedule(&self) -> RetrySchedule {
        RetrySchedule {
            delays: self.retry.delays_seconds.iter().map(|s| Duration::from_secs_f64(*s)).collect(),
            max_attempts: self.retry.max_attempts,
        }
    }

    /// `s3.*`
    pub fn s3_options(&self) -> S3Options {
        let s = &self.s3;
        S3Options {
            endpoint: some(&s.endpoint),
            region: some(&s.region),
            path_style: s.path_style,
            allowed_buckets: s.allowed_buckets.clone(),
            concurrency: s.concurrency,
            ca_file: path(&s.ca_file),
        }
    }

    /// `amqp.*` that concern connections; `name` is the worker's.
    pub fn amqp_options(&self, name: &str) -> AmqpOptions {
        let a = &self.amqp;
        AmqpOptions {
            url: a.url.as_str().to_owned(),
            ca_file: path(&a.ca_file),
            client_cert_file: path(&a.client_cert_file),
            client_key_file: path(&a.client_key_file),
            name: name.to_owned(),
        }
    }

    /// The queues around the first queue of jobs.
    pub fn topology(&self) -> Topology {
        self.topology_of(self.amqp.jobs_queue.first())
    }

    /// The queues around one queue of jobs.
    pub fn topology_of(&self, lane: &Lane) -> Topology {
        let a = &self.amqp;
        Topology {
            jobs: lane.queue.clone(),
            results: a.results_queue.clone(),
            dead: a.dead_queue.clone(),
            control_exchange: a.control_exchange.clone(),
            retry_delays: self.retry_schedule().delays,
        }
    }

    /// How class vectors are found and kept.
    pub fn catalog_options(&self) -> CatalogOptions {
        CatalogOptions {
            poll: Duration::from_secs_f64(self.classes.poll_seconds),
            cache_bytes: self.classes.cache_bytes,
            version_bytes: self.classes.version_bytes,
        }
    }

    /// The threads that large class sets are scored on: those that one session of the model has,
    /// which waits meanwhile.
    pub fn scorer(&self) -> Scorer {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.embedder.threads;
        Scorer::new(if threads == 0 { cores } else { threads })
    }

    /// `classes.shadow`
    ///
    /// # Errors
    /// [`SettingsError`] if it is no version of a class set.
    pub fn shadow(&self) -> Result<Option<ClassSelector>, SettingsError> {
        let Some(text) = some(&self.classes.shadow) else { return Ok(None) };
        let wrong = |e: String| SettingsError(format!("classes.shadow: {e}"));
        let selector = ClassSelector::parse(&text).map_err(|e| wrong(e.to_string()))?;
        if selector.version.is_none() {
            return Err(wrong(format!("{text:?} names no version; write {text}@VERSION")));
        }
        Ok(Some(selector))
    }

    /// `classes.preload`
    ///
    /// # Errors
    /// [`SettingsError`] if one is no class set.
    pub fn preload(&self) -> Result<Vec<ClassSelector>, SettingsError> {
        self.classes
            .preload
            .iter()
            .map(|text| ClassSelector::parse(text))
            .collect::<Result<_, _>>()
            .map_err(|e| SettingsError(format!("classes.preload: {e}")))
    }
}

/// The keys whose values are lists: in the environment and in flags they are split at commas.
const LISTS: [&str; 6] = [
    "embedder.devices",
    "classes.preload",
    "amqp.jobs_queue",
    "amqp.reply_to_allow",
    "s3.allowed_buckets",
    "retry.delays_seconds",
];

fn flag_value(key: &str, value: &str) -> config::Value {
    if LISTS.contains(&key) {
        let parts: Vec<config::Value> =
            value.split(',').map(str::trim).filter(|v| !v.is_empty()).map(Into::into).collect();
        return parts.into();
    }
    value.into()
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn path(text: &str) -> Option<PathBuf> {
    some(text).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn load(
        file: Option<&str>,
        env: &[(&str, &str)],
        flags: &[(&str, &str)],
    ) -> Result<Settings, SettingsError> {
        let folder = tempfile::tempdir().unwrap();
        let path = file.map(|text| {
            let path = folder.path().join("angler.toml");
            std::fs::write(&path, text).unwrap();
            path
        });
        let source: HashMap<String, String> =
            env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let environment = Environment::with_prefix("ANGLER")
            .prefix_separator("__")
            .separator("__")
            .try_parsing(true)
            .list_separator(",")
            .source(Some(source));
        let environment = LISTS.iter().fold(environment, |e, key| e.with_list_parse_key(key));
        let flags: Vec<(String, String)> =
            flags.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Settings::layered(path.as_deref(), environment, &flags)
    }

    fn refused(file: &str) -> String {
        match load(Some(file), &[], &[]) {
            Ok(_) => panic!("{file} was accepted"),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn the_defaults_are_complete_and_valid() {
        let settings = load(Some(""), &[], &[]).unwrap();
        assert_eq!(settings.embedder.max_batch, 32);
        assert_eq!(settings.embedder.backend, BackendChoice::Auto);
    }

    #[test]
    fn later_layers_win() {
        let file = "[amqp]\nprefetch = 2\njobs_queue = \"from-file\"\n[s3]\nconcurrency = 7";
        let env = [
            ("ANGLER__AMQP__PREFETCH", "3"),
            ("ANGLER__AMQP__URL", "amqp://u:p@h/"),
            ("ANGLER__S3__ALLOWED_BUCKETS", "a,b"),
            ("ANGLER__EMBEDDER__DEVICES", "0,1"),
        ];
        let flags = [("amqp.prefetch", "4"), ("retry.delays_seconds", "0.5,2")];
        let s = load(Some(file), &env, &flags).unwrap();
        assert_eq!((s.amqp.prefetch, s.amqp.jobs_queue.names().as_str()), (4, "from-file"));
        assert_eq!((s.s3.concurrency, s.amqp.url.as_str()), (7, "amqp://u:p@h/"));
        assert_eq!(s.s3.allowed_buckets, ["a", "b"]);
        assert_eq!(s.embedder.devices, [0, 1]);
        assert_eq!(s.retry.delays_seconds, [0.5, 2.0]);
    }

    #[test]
    fn several_brokers_come_from_any_layer() {
        let url = |s: Settings| s.amqp.url.as_str().to_owned();
        let both = "amqp://u:p@a/v,amqp://u:p@b/v";
        let file = "[amqp]\nurl = [\"amqp://u:p@a/v\", \"amqp://u:p@b/v\"]";
        assert_eq!(url(load(Some(file), &[], &[]).unwrap()), both);
        assert_eq!(url(load(Some(""), &[("ANGLER__AMQP__URL", both)], &[]).unwrap()), both);
        assert_eq!(url(load(Some(file), &[], &[("amqp.url", both)]).unwrap()), both);
        let one = [("ANGLER__AMQP__URL", "amqp://u:a,b@h/v")];
        assert_eq!(url(load(Some(file), &one, &[]).unwrap()), "amqp://u:a,b@h/v");
        assert!(refused("[amqp]\nurl = []").contains("amqp.url is empty"));
    }

    #[test]
    fn no_layer_quotes_a_url_that_cannot_be_used() {
        for file in [
            "[amqp]\nurl = \"amqp:u:hunter2@h\"",
            "[amqp]\nurl = \"amqp://u:hunter2@h",
            "[amqp]\nurl = amqp://u:hunter2@h",
            "[amqp]\nurl = \"amqp://u:hunter2@h\" \"",
            "[amqp]\nurl = { host = \"amqp://u:hunter2@h\" }",
            "[amqp]\nurl = [\"amqp://h\", \"amqp://u:1/hunter2@h\"]",
            "[amqp]\nurl = [[\"amqp://h:x\"], \"hunter2\"]",
            "[amqp]\nprefetch = \"amqp://u:hunter2@h\"",
            "[amqp]\nprefetch = \"hunter2\"",
            "[amqp]\njobs_queue = \"amqp://u:hunter2@h:5672\"",
            "[embedder]\nbackend = \"amqp://u:hunter2@h\"",
            "amqp = \"amqp://u:hunter2@h\"",
            "amqp = \"hunter2\"",
            "\"amqp://u:hunter2@h\" = 1",
        ] {
            let message = refused(file);
            assert!(!message.contains("hunter2"), "{file}: {message}");
        }
        for (key, value) in [
            ("ANGLER__AMQP__URL", "4711"),
            ("ANGLER__AMQP__URL", "-4711.5"),
            ("ANGLER__AMQP__URL", "4711@h,amqp://h"),
            ("ANGLER__AMQP__URL", "amqp://h/v,amqp:u:4711@h"),
            ("ANGLER__AMQP", "amqp://u:4711@h"),
            ("ANGLER__AMQP", "4711"),
            ("ANGLER__AMQP__PREFETCH", "amqp://u:4711@h"),
            ("ANGLER__AMQP__URL__amqp://u:4711@h", "1"),
        ] {
            let message = load(Some(""), &[(key, value)], &[]).err().unwrap().to_string();
            assert!(!message.contains("4711"), "{key}={value}: {message}");
        }
        for (key, value) in [
            ("amqp.url", "u:hunter2@h"),
            ("amqp.url:amqp://u:hunter2@h?heartbeat", "5"),
            ("amqp.url amqp://u:hunter2@h?heartbeat", "5"),
            ("amqp", "hunter2"),
        ] {
            let message = load(Some(""), &[], &[(key, value)]).err().unwrap().to_string();
            assert!(!message.contains("hunter2"), "{key}={value}: {message}");
        }
    }

    #[test]
    fn several_queues_of_jobs_come_from_any_layer() {
        let lanes = |s: Settings| {
            let lanes = s.amqp.jobs_queue.iter();
            lanes.map(|lane| (lane.queue.clone(), lane.weight)).collect::<Vec<_>>()
        };
        let both = [("quick".to_owned(), 8), ("bulk".to_owned(), 1)];
        let file = "[amqp]\njobs_queue = [\"quick:8\", \"bulk\"]";
        assert_eq!(lanes(load(Some(file), &[], &[]).unwrap()), both);
        let env = [("ANGLER__AMQP__JOBS_QUEUE", "quick:8,bulk")];
        assert_eq!(lanes(load(Some(""), &env, &[]).unwrap()), both);
        let flag = [("amqp.jobs_queue", "quick:8, bulk")];
        assert_eq!(lanes(load(Some(""), &[], &flag).unwrap()), both);
        let one = [("ANGLER__AMQP__JOBS_QUEUE", "only")];
        assert_eq!(lanes(load(Some(file), &one, &[]).unwrap()), [("only".to_owned(), 1)]);
    }

    #[test]
    fn unknown_keys_are_errors_in_every_layer() {
        assert!(refused("[amqp]\nprefecth = 2").contains("prefecth"));
        assert!(refused("[nonsense]\na = 1").contains("nonsense"));
        let env = load(Some(""), &[("ANGLER__AMQP__PREFECTH", "2")], &[]);
        assert!(env.err().unwrap().to_string().contains("prefecth"));
        let flag = load(Some(""), &[], &[("amqp.prefecth", "2")]);
        assert!(flag.err().unwrap().to_string().contains("prefecth"));
    }

    #[test]
    fn values_that_make_no_sense_are_errors_that_name_the_key() {
        for (file, key) in [
            ("[embedder]\nmax_batch = 0", "embedder.max_batch"),
            ("[embedder]\nbackend = \"gpu\"", "gpu"),
            ("[embedder]\nscoring = \"device\"", "device"),
            ("[limits]\nbytes_in_flight = 5", "limits.bytes_in_flight"),
            ("[limits]\nimage_seconds = 0", "limits.image_seconds"),
            ("[retry]\ndelays_seconds = [-1]", "retry.delays_seconds"),
            ("[classes]\npreload = [\"../x\"]", "classes.preload"),
            ("[classes]\nshadow = \"bottles\"", "classes.shadow"),
            ("[classes]\npoll_seconds = 0", "classes.poll_seconds"),
            ("[amqp]\nclient_key_file = \"k\"", "amqp.client_cert_file"),
            ("[amqp]\nprefetch = 70000", "prefetch"),
            ("[amqp]\njobs_queue = []", "amqp.jobs_queue"),
            ("[amqp]\njobs_queue = [\"a\", \"a:2\"]", "amqp.jobs_queue names a twice"),
            ("[amqp]\nurl = \"http://h\"", "amqp.url"),
            ("[amqp]\ndead_queue = \"\"", "amqp.dead_queue must have 1 to 255 bytes, not 0"),
            (&format!("[amqp]\nresults_queue = {:?}", "r".repeat(256)), "amqp.results_queue"),
            (&format!("[amqp]\njobs_queue = {:?}", "j".repeat(100)), "may have 99"),
            ("[telemetry]\notlp_endpoint = \"h:4318\"", "telemetry.otlp_endpoint = \"h:4318\""),
            ("[telemetry]\notlp_endpoint = \"https://\"", "telemetry.otlp_endpoint"),
            ("[telemetry]\notlp_sample = 1.5", "telemetry.otlp_sample"),
            ("[telemetry]\notlp_sample = nan", "telemetry.otlp_sample"),
        ] {
            let message = refused(file);
            assert!(message.contains(key), "{file}: {message}");
        }
        assert!(load(None, &[], &[]).is_ok());
        assert!(Settings::load(Some(Path::new("/nowhere.toml")), &[]).is_err());
    }

    #[test]
    fn passwords_are_not_shown() {
        // No URL holds a ^, and those who would say so quote it.
        let message = refused("[telemetry]\notlp_endpoint = \"http://u:hunter2^@h:4318\"");
        assert!(message.contains("otlp_endpoint") && !message.contains("hunter2"), "{message}");
        let message = refused("[telemetry]\notlp_endpoint = \"u:hunter2@h:4318\"");
        assert!(message.contains("otlp_endpoint") && !message.contains("hunter2"), "{message}");
        // Two slashes are missing.
        let message = refused("[amqp]\nurl = \"amqp:u:hunter2@h\"");
        assert!(message.contains("amqp.url") && !message.contains("hunter2"), "{message}");
    }
}
