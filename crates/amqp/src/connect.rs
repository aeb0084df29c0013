//! Opens a connection to one of the brokers of `amqp.url`.
//!
//! The addresses are tried in random order, so that a fleet spreads over the nodes of a cluster. The
//! next address is tried when one fails, or when none has answered for `HEAD_START`; the first
//! connection that the broker opens is used. So a node that takes connections and says nothing
//! costs seconds, and one that is only slow is still waited for. The IP addresses of a host name
//! are tried in the same way.

use std::future::{Future, poll_fn};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_io::AsyncRead;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lapin::tcp::{AsyncTcpStream, RustlsConnector};
use lapin::{Connection, ConnectionProperties, ErrorKind};
use tokio::net::lookup_host;
use tokio::time::{sleep, timeout};

use angler_tls::BROKER;
use angler_wire::text::chain;

use super::address::{Address, addresses};
use super::sanitize::{self, Sanitized, Tcp};
use super::{AmqpError, AmqpOptions};

/// What opening a connection to one address may take.
const CONNECT_SECONDS: u64 = 15;

/// How long an address may stay silent before the next one is tried as well.
const HEAD_START: Duration = Duration::from_secs(2);

/// How long to listen for the reason of a broker that hung up.
const ALERT: Duration = Duration::from_secs(3);

/// Opens a connection; `role` becomes part of its name in the broker's listings.
///
/// # Errors
/// [`AmqpError`].
pub async fn connect(options: &AmqpOptions, role: &str) -> Result<Connection, AmqpError> {
    Ok(connect_somewhere(options, role).await?.0)
}

/// Opens a connection; returns also which address it leads to.
///
/// # Errors
/// [`AmqpError`].
pub(crate) async fn connect_somewhere(
    options: &AmqpOptions,
    role: &str,
) -> Result<(Connection, Address), AmqpError> {
    let mut all = addresses(&options.url)?;
    fastrand::shuffle(&mut all);
    let attempts =
        all.into_iter().map(async |address| match connect_to(options, &address, role).await {
            Ok(connection) => Ok((connection, address)),
            Err(error) => {
                tracing::debug!(broker = %address, role, "cannot connect: {}", chain(&error));
                Err((address, error))
            }
        });
    let (connection, address) = first(attempts).await.map_err(several)?;
    tracing::debug!(broker = %address, role, "connected");
    Ok((connection, address))
}

/// Opens a connection to this address.
///
/// # Errors
/// [`AmqpError`].
pub async fn connect_to(
    options: &AmqpOptions,
    address: &Address,
    role: &str,
) -> Result<Connection, AmqpError> {
    let tls = tls(options, address).await?;
    let name = format!("{role} {}", options.name);
    let connecting = async {
        let ips = resolve(address).await.map_err(|error| AmqpError::Broker(error.into()))?;
        let attempts = ips.into_iter().map(|ip| open(address, ip, tls.as_ref(), &name));
        first(attempts).await.map_err(most_telling)
    };
    let connected = timeout(Duration::from_secs(CONNECT_SECONDS), connecting).await;
    let error = match connected {
        Ok(Ok(connection)) => return Ok(connection),
        Ok(Err(error)) => error,
        Err(_) => return Err(AmqpError::Silent(CONNECT_SECONDS)),
    };
    match (tls, error) {
        (Some(tls), AmqpError::Broker(error)) if matches!(error.kind(), ErrorKind::IOError(_)) => {
            let alert = timeout(ALERT, alert(address, &tls)).await;
            let explained = alert.ok().and_then(|error| BROKER.explain(&error));
            Err(explained.map_or(AmqpError::Broker(error), AmqpError::Tls))
        }
        (_, error) => Err(error),
    }
}

/// Runs attempts until one succeeds, and drops the others. One begins at once, the next when one has
/// failed or none has ended for [`HEAD_START`].
async fn first<T, E>(
    attempts: impl IntoIterator<Item = impl Future<Output = Result<T, E>>>,
) -> Result<T, Vec<E>> {
    let (mut waiting, mut errors) = (attempts.into_iter().peekable(), Vec::new());
    let mut running = FuturesUnordered::new();
    running.extend(waiting.next());
    loop {
        tokio::select! {
            biased;
            ended = running.next() => match ended {
                Some(Ok(done)) => return Ok(done),
                Some(Err(error)) => {
                    errors.push(error);
                    running.extend(waiting.next());
                }
                None => return Err(errors),
            },
            () = sleep(HEAD_START), if waiting.peek().is_some() => running.extend(waiting.next()),
        }
    }
}

/// Why no address of several works.
fn several(mut errors: Vec<(Address, AmqpError)>) -> AmqpError {
    match errors.len() {
        1 => errors.remove(0).1,
        _ => AmqpError::Nowhere(
            errors.into_iter().map(|(address, error)| (address.to_string(), error)).collect(),
        ),
    }
}

/// Why no IP address of a host works: an answer says more than that there was none.
fn most_telling(errors: Vec<AmqpError>) -> AmqpError {
    let telling = |error: &AmqpError| match error {
        AmqpError::Broker(error) => !matches!(error.kind(), ErrorKind::IOError(_)),
        AmqpError::Silent(_) => false,
        _ => true,
    };
    let nothing = || AmqpError::Broker(std::io::Error::from(std::io::ErrorKind::NotFound).into());
    errors.into_iter().max_by_key(telling).unwrap_or_else(nothing)
}

/// The IP addresses of a host, in random order.
async fn resolve(address: &Address) -> std::io::Result<Vec<SocketAddr>> {
    let authority = &address.uri.authority;
    let mut ips: Vec<SocketAddr> =
        lookup_host((authority.host.as_str(), authority.port)).await?.collect();
    fastrand::shuffle(&mut ips);
    Ok(ips)
}

/// Connects and logs in.
async fn open(
    address: &Address,
    ip: SocketAddr,
    tls: Option<&RustlsConnector>,
    name: &str,
) -> Result<Connection, AmqpError> {
    let explained = |error: lapin::Error| match BROKER.explain(&error) {
        Some(explained) => explained.into(),
        None => AmqpError::Broker(error),
    };
    // Ours and not lapin's, which at `log.level = "trace"` logs the address with its password, and
    // fails where the system has no authorities, whatever `amqp.ca_file` holds.
    let (stream, hang_up) = dial_ip(address, ip, tls).await.map_err(|e| explained(e.into()))?;
    let stream = Mutex::new(Some(Sanitized::new(stream)));
    let properties =
        ConnectionProperties::default().with_connection_name(format!("angler {name}").into());
    let connecting = Connection::connector(
        address.uri.clone(),
        sanitize::runtime(),
        async move |_, _| {
            let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
            // It is asked for once: lapin does not reconnect unless it is told to.
            let spent = || std::io::Error::from(std::io::ErrorKind::NotConnected);
            Ok(AsyncTcpStream::Plain(stream.ok_or_else(spent)?))
        },
        properties,
    );
    let connection = connecting.await.map_err(explained)?;
    hang_up.forget();
    Ok(connection)
}

/// Ends the socket of an attempt when nobody waits for it any more. lapin's thread would read from it
/// forever: there are no heartbeats before the broker has opened the connection.
struct HangUp(Option<TcpStream>);

impl HangUp {
    fn forget(mut self) {
        self.0.take();
    }
}

impl Drop for HangUp {
    fn drop(&mut self) {
        if let Some(socket) = &self.0 {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Why the broker hangs up after the handshake. In TLS 1.3 it looks at a client's certificate only
/// then, and a client that has written something by then gets a reset instead of its alert. So once
/// more, and only listening.
async fn alert(address: &Address, tls: &RustlsConnector) -> std::io::Error {
    let listening = async {
        let mut stream = dial(address, Some(tls)).await?;
        poll_fn(|context| Pin::new(&mut stream).poll_read(context, &mut [0])).await
    };
    match listening.await {
        Ok(_) => std::io::ErrorKind::UnexpectedEof.into(),
        Err(error) => error,
    }
}

/// A connection to the broker's address on which nothing has been said.
pub(super) async fn dial(address: &Address, tls: Option<&RustlsConnector>) -> std::io::Result<Tcp> {
    let ips = resolve(address).await?;
    let attempts = ips.into_iter().map(|ip| dial_ip(address, ip, tls));
    match first(attempts).await {
        Ok((stream, hang_up)) => {
            hang_up.forget();
            Ok(stream)
        }
        Err(mut errors) => Err(errors.pop().unwrap_or_else(|| std::io::ErrorKind::NotFound.into())),
    }
}

/// The same at one of its IP addresses, with what ends it.
async fn dial_ip(
    address: &Address,
    ip: SocketAddr,
    tls: Option<&RustlsConnector>,
) -> std::io::Result<(Tcp, HangUp)> {
    let runtime = lapin::runtime::default_runtime().map_err(std::io::Error::other)?;
    let stream = Tcp::connect(&runtime, ip).await?;
    let socket = match &stream {
        AsyncTcpStream::Plain(plain) => Some(plain.get_ref().as_fd().try_clone_to_owned()?.into()),
        _ => None,
    };
    let stream = match tls {
        Some(tls) => stream.into_rustls(tls, &address.uri.authority.host).await?,
        None => stream,
    };
    Ok((stream, HangUp(socket)))
}

/// How to speak TLS with this address. `None` if it wants none.
pub(super) async fn tls(
    options: &AmqpOptions,
    address: &Address,
) -> Result<Option<RustlsConnector>, AmqpError> {
    if !address.is_tls() {
        return Ok(None);
    }
    let AmqpOptions { ca_file, client_cert_file, client_key_file, .. } = options.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let identity = client_cert_file.as_deref().zip(client_key_file.as_deref());
        BROKER.client_config(ca_file.as_deref(), identity)
    });
    match reading.await {
        Ok(config) => Ok(Some(config?.into())),
        Err(panic) => Err(AmqpError::Reading(panic)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    /// Ends after `seconds`.
    async fn attempt(seconds: u64, outcome: Result<u64, u64>) -> Result<u64, u64> {
        sleep(Duration::from_secs(seconds)).await;
        outcome
    }

    /// The outcome of attempts, and the seconds it took.
    async fn outcome(attempts: &[(u64, Result<u64, u64>)]) -> (Result<u64, Vec<u64>>, u64) {
        let begin = Instant::now();
        let attempts = attempts.iter().map(|(seconds, outcome)| attempt(*seconds, *outcome));
        (first(attempts).await, begin.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_address_costs_a_head_start_and_one_that_refuses_nothing() {
        assert_eq!(outcome(&[(1, Ok(1)), (0, Ok(2))]).await, (Ok(1), 1));
        assert_eq!(outcome(&[(0, Err(1)), (0, Err(2)), (1, Ok(3))]).await, (Ok(3), 1));
        assert_eq!(outcome(&[(900, Ok(1)), (0, Ok(2))]).await, (Ok(2), 2));
        assert_eq!(outcome(&[(900, Ok(1)), (900, Ok(2)), (0, Ok(3))]).await, (Ok(3), 4));
        // A slow one is still waited for.
        assert_eq!(outcome(&[(5, Ok(1)), (900, Ok(2))]).await, (Ok(1), 5));
        assert_eq!(outcome(&[(9, Err(1)), (0, Err(2))]).await, (Err(vec![2, 1]), 9));
        assert_eq!(outcome(&[]).await, (Err(vec![]), 0));
    }
}
