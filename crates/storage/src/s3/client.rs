//! The SDK's client: made from the settings, and made again when its credentials are rejected.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{BehaviorVersion, Region, SharedHttpClient};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, ConnectorBuilder};

use angler_tls::{STORE, TlsError, system_has_authorities};
use angler_wire::text::chain;

use super::S3Options;
use super::answers::lacks_credentials;

/// A client is not replaced sooner than this after it was made.
const RENEWAL: Duration = Duration::from_secs(1);

/// The client for the next request.
///
/// The SDK reads a profile file once and keeps temporary credentials until they expire. So a client
/// whose credentials the store rejects is replaced by a new one, which looks for them again wherever
/// the SDK does. Only the environment cannot change under a process.
#[derive(Clone)]
pub struct Clients(Arc<Shared>);

struct Shared {
    /// What the client is made from. `None` if it was given and is never replaced.
    options: Option<S3Options>,
    current: Mutex<Made>,
    /// Held while a new client is made.
    renewal: tokio::sync::Mutex<()>,
}

struct Made {
    client: Client,
    at: Instant,
}

impl From<Client> for Clients {
    /// Always this client.
    fn from(client: Client) -> Self {
        Self::made(client, None)
    }
}

impl Clients {
    /// Makes the first client.
    ///
    /// # Errors
    /// If `ca_file` cannot be used.
    pub async fn new(options: &S3Options) -> Result<Self, TlsError> {
        let client = client(options).await?;
        // Found once: without an endpoint the search may ask the network.
        let region = client.config().region().map(ToString::to_string);
        let options = S3Options { region, ..options.clone() };
        Ok(Self::made(client, Some(options)))
    }

    fn made(client: Client, options: Option<S3Options>) -> Self {
        let current = Mutex::new(Made { client, at: Instant::now() });
        Self(Arc::new(Shared { options, current, renewal: tokio::sync::Mutex::default() }))
    }

    /// The client for the next request.
    pub fn get(&self) -> Client {
        self.current().client.clone()
    }

    /// Returns the outcome of a request that began at `asked`, after replacing the client if its
    /// credentials were rejected.
    pub(super) async fn checked<T, E>(
        &self,
        asked: Instant,
        outcome: Result<T, SdkError<E, HttpResponse>>,
    ) -> Result<T, SdkError<E, HttpResponse>>
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        if outcome.as_ref().is_err_and(lacks_credentials) {
            self.renew(asked).await;
        }
        outcome
    }

    async fn renew(&self, asked: Instant) {
        let Some(options) = &self.0.options else { return };
        let _turn = self.0.renewal.lock().await;
        let made = self.current().at;
        // Another request may have seen to it; and a store that rejects everything costs no more.
        if made > asked || made.elapsed() < RENEWAL {
            return;
        }
        match client(options).await {
            Ok(client) => *self.current() = Made { client, at: Instant::now() },
            Err(error) => {
                tracing::warn!("cannot read the store's credentials again: {}", chain(&error))
            }
        }
    }

    fn current(&self) -> MutexGuard<'_, Made> {
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client that reconnects, retries and times out on its own.
///
/// Throttling and 5xx answers are tried again with a short backoff, three times in all, before an
/// error reaches the caller, which knows how long there is to wait.
///
/// # Errors
/// If `ca_file` cannot be used.
pub(super) async fn client(options: &S3Options) -> Result<Client, TlsError> {
    let chain = RegionProviderChain::first_try(options.region.clone().map(Region::new));
    // Another server than AWS's has no instance metadata to ask, and asking takes seconds.
    let chain = match options.endpoint {
        Some(_) => chain.or_else(EnvironmentVariableRegionProvider::new()),
        None => chain.or_default_provider(),
    };
    let chain = chain.or_else(Region::from_static("us-east-1"));
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(5))
        .read_timeout(Duration::from_secs(20))
        .operation_timeout(Duration::from_secs(60))
        .build();
    let retries = RetryConfig::standard()
        .with_max_attempts(3)
        .with_initial_backoff(Duration::from_millis(200));
    let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12());
    if let Some(path) = &options.ca_file {
        // For whoever hands out credentials as well.
        loader = loader.http_client(http_client(path)?);
    }
    let shared = loader.region(chain).timeout_config(timeouts).retry_config(retries).load().await;
    let mut config =
        aws_sdk_s3::config::Builder::from(&shared).force_path_style(options.path_style);
    if let Some(endpoint) = &options.endpoint {
        config = config.endpoint_url(endpoint);
    }
    Ok(Client::from_conf(config.build()))
}

/// The SDK's own HTTP client, proxies from the environment included, with more authorities.
fn http_client(ca_file: &Path) -> Result<SharedHttpClient, TlsError> {
    // Checked here: the client panics at what it cannot read.
    let (pem, _) = STORE.authorities(ca_file)?;
    let trusted =
        TrustStore::empty().with_native_roots(system_has_authorities()).with_pem_certificate(pem);
    let context = TlsContext::builder().with_trust_store(trusted).build();
    let context = context.map_err(|e| STORE.refused(ca_file, e.into()))?;
    Ok(Builder::new().build_with_connector_fn(move |settings, components| {
        let mut connector = ConnectorBuilder::default()
            .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
            .tls_context(context.clone())
            .proxy_config(ProxyConfig::from_env());
        connector.set_connector_settings(settings.cloned());
        if let Some(components) = components {
            connector.set_sleep_impl(components.sleep_impl());
        }
        connector.build()
    }))
}
