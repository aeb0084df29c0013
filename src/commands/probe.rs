//! `angler probe`: whether the worker of these settings is ready, or alive. The health check of a container without a
//! shell; an orchestrator that speaks HTTP asks `/readyz` and `/livez` itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};

use super::UsageError;
use crate::app::App;

/// What of an answer is read; the worker's are one line.
const ANSWER_BYTES: u64 = 8_192;

/// Ask the worker on http.listen whether it is ready
///
/// Exit code 0: it is; 1: it is not, or nothing answers, and the reason is said. For health checks: it asks
/// over loopback and opens neither broker nor store nor model.
#[derive(Args)]
pub struct Probe {
    /// Ask whether work in it moves, and not whether it takes work
    #[arg(long)]
    live: bool,
    /// Seconds to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    wait: u64,
}

impl Probe {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let listen = &app.settings.http.listen;
        let path = if self.live { "/livez" } else { "/readyz" };
        let asked = async {
            let address = address(listen).await?;
            let answer = get(address, path).await;
            answer.with_context(|| format!("no worker answers on http://{address}{path}"))
        };
        let (status, text) =
            tokio::time::timeout(Duration::from_secs(self.wait), asked).await.with_context(
                || format!("no answer from {listen}{path} within {} s", self.wait),
            )??;
        if status != 200 {
            bail!("{path} answers {status}: {text}");
        }
        println!("{text}");
        Ok(())
    }
}

/// Where a worker that listens on `listen` is asked from the same machine.
async fn address(listen: &str) -> Result<SocketAddr> {
    let usage = |why: &str| UsageError(format!("http.listen = {listen:?}: {why}"));
    if listen.is_empty() {
        return Err(usage("a worker without HTTP cannot be asked").into());
    }
    let mut found = lookup_host(listen).await.map_err(|error| usage(&error.to_string()))?;
    let mut address = found.next().ok_or_else(|| usage("no such address"))?;
    match (address.port(), address.ip()) {
        (0, _) => return Err(usage("the port that a worker took is only in its log").into()),
        (_, IpAddr::V4(ip)) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        (_, IpAddr::V6(ip)) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    Ok(address)
}

/// Status and text of a page. HTTP/1.0, so that the answer ends with the connection.
async fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let status = answer.split(' ').nth(1).and_then(|word| word.parse().ok());
    let (Some(status), Some((_, text))) = (status, answer.split_once("\r\n\r\n")) else {
        bail!("what listens there does not speak HTTP");
    };
    Ok((status, text.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use angler_core::readiness::Readiness;

    use super::*;
    use crate::config::Settings;
    use crate::http;

    async fn probe(listen: &str, live: bool) -> Result<()> {
        let settings = Settings::load(None, &[("http.listen".to_owned(), listen.to_owned())]);
        Probe { live, wait: 2 }.run(&App::new(settings.unwrap())).await
    }

    async fn refused(listen: &str, live: bool) -> String {
        format!("{:#}", probe(listen, live).await.unwrap_err())
    }

    #[tokio::test]
    async fn it_says_what_the_worker_says() {
        let readiness = Arc::new(Readiness::default());
        let (address, server) = http::serve("127.0.0.1:0", Arc::clone(&readiness)).await.unwrap();
        // As in a container, where it listens on all addresses.
        let listen = format!("0.0.0.0:{}", address.port());
        probe(&listen, true).await.unwrap();
        let said = refused(&listen, false).await;
        assert!(said.contains("503: not ready: the model is not loaded yet"), "{said}");

        readiness.set_warm();
        readiness.set_consuming("jobs");
        probe(&listen, false).await.unwrap();
        readiness.set_stalled(Some("1 image(s) being decoded".into()));
        let said = refused(&listen, true).await;
        assert!(said.contains("/livez answers 503: no progress: 1 image(s)"), "{said}");
        drop(server);
    }

    #[tokio::test]
    async fn what_cannot_be_asked_is_said() {
        // A listener that never answers, and one that is gone.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listen = silent.local_addr().unwrap().to_string();
        assert!(refused(&listen, true).await.contains("within 2 s"));
        drop(silent);
        assert!(refused(&listen, true).await.contains("no worker answers"));
        for (listen, why) in [("", "without HTTP"), ("127.0.0.1:0", "in its log"), ("nowhere", "")]
        {
            let error = probe(listen, false).await.unwrap_err();
            assert!(error.is::<UsageError>() && error.to_string().contains(why), "{error}");
        }
    }
}
