//! lapin's connector yields the stream of its runtime: Tokio, with our stream in the place of its own.

use std::io::{Read, Result, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::tcp::AsyncTcpStream;

use super::Sanitized;

/// A connection to a broker, with or without TLS.
pub(crate) type Tcp = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// The current Tokio runtime, for lapin.
pub(crate) fn runtime() -> Runtime<RuntimeParts<Tokio, Sanitizing>> {
    let tokio = Tokio::current();
    Runtime::new(RuntimeParts::new(tokio.clone(), Sanitizing(tokio)))
}

/// Tokio's reactor, whose connections are [`Sanitized`].
#[derive(Debug, Clone)]
pub(crate) struct Sanitizing(Tokio);

impl Reactor for Sanitizing {
    type TcpStream = Sanitized<Tcp>;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move { Ok(Sanitized::new(AsyncTcpStream::Plain(connecting.await?))) }
    }
}
