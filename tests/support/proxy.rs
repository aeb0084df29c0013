//! A TCP proxy that misbehaves on demand, on loopback.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

/// What the proxy does to bytes, in both directions; the default does nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Fault {
    /// Each chunk arrives so much later.
    pub latency: Duration,
    /// Each connection gets so many bytes a second.
    pub bytes_per_second: Option<u64>,
    /// Connections stay open, and nothing passes.
    pub black_hole: bool,
    /// New connections are reset at once.
    pub refuse: bool,
    /// A connection is reset after so many bytes from the server.
    pub cut_after: Option<u64>,
}

/// Passes connections to an upstream until it is dropped.
pub struct Proxy {
    address: SocketAddr,
    fault: watch::Sender<Fault>,
    cuts: watch::Sender<u64>,
    _accepting: AbortOnDropHandle<()>,
}

impl Proxy {
    /// In front of `upstream`, `host:port`.
    pub async fn new(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (fault, cuts) = (watch::Sender::new(Fault::default()), watch::Sender::new(0));
        let upstream: Arc<str> = upstream.into();
        let (faults, cut) = (fault.subscribe(), cuts.subscribe());
        let accepting = tokio::spawn(async move {
            // Ends with the listener: those that are open go with it.
            let mut open = tokio::task::JoinSet::new();
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                while open.try_join_next().is_some() {}
                if faults.borrow().refuse {
                    reset(&client);
                    continue;
                }
                open.spawn(pass(client, Arc::clone(&upstream), faults.clone(), cut.clone()));
            }
        });
        Self { address, fault, cuts, _accepting: AbortOnDropHandle::new(accepting) }
    }

    /// `127.0.0.1:port`.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// From now on, for open connections too.
    pub fn fault(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Nothing is wrong any more.
    pub fn heal(&self) {
        self.fault(Fault::default());
    }

    /// Resets all open connections.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

/// Its end will be a RST instead of a FIN.
fn reset(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}

async fn pass(
    client: TcpStream,
    upstream: Arc<str>,
    faults: watch::Receiver<Fault>,
    mut cuts: watch::Receiver<u64>,
) {
    let Ok(server) = TcpStream::connect(&*upstream).await else { return reset(&client) };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    // Whoever ends first, ends both, with a RST: a fault that is mistaken for an orderly end would
    // be none.
    reset(&client);
    reset(&server);
    // Not `into_split`, whose halves say an orderly end when they are dropped.
    let (from_client, to_client) = tokio::io::split(client);
    let (from_server, to_server) = tokio::io::split(server);
    let cut = async {
        cuts.mark_unchanged();
        let _ = cuts.changed().await;
    };
    tokio::select! {
        () = pump(from_client, to_server, faults.clone(), false) => {}
        () = pump(from_server, to_client, faults.clone(), true) => {}
        () = cut => {}
    }
}

async fn pump(
    mut from: ReadHalf<TcpStream>,
    mut to: WriteHalf<TcpStream>,
    mut faults: watch::Receiver<Fault>,
    of_server: bool,
) {
    let mut chunk = vec![0; 16 << 10];
    let mut passed = 0;
    loop {
        let Ok(read @ 1..) = from.read(&mut chunk).await else { return };
        let Ok(fault) = faults.wait_for(|fault| !fault.black_hole).await.map(|fault| *fault) else {
            return;
        };
        sleep(fault.latency).await;
        if let Some(rate) = fault.bytes_per_second {
            sleep(Duration::from_secs_f64(read as f64 / rate as f64)).await;
        }
        let room = fault.cut_after.filter(|_| of_server).map(|after| after.saturating_sub(passed));
        let part = room.map_or(read, |room| read.min(room as usize));
        if to.write_all(&chunk[..part]).await.is_err() || part < read {
            return;
        }
        passed += part as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{Instant, timeout};

    const SHORT: Duration = Duration::from_millis(200);

    /// A server that sends back what it gets.
    async fn echo() -> (Proxy, AbortOnDropHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::new(&listener.local_addr().unwrap().to_string()).await;
        let server = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        (proxy, AbortOnDropHandle::new(server))
    }

    async fn ask(stream: &mut TcpStream, bytes: usize) -> std::io::Result<usize> {
        stream.write_all(&vec![7; bytes]).await?;
        stream.read_exact(&mut vec![0; bytes]).await
    }

    #[tokio::test]
    async fn each_fault_does_what_it_says_and_ends() {
        let (proxy, _server) = echo().await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(ask(&mut stream, 100).await.unwrap(), 100);

        proxy.fault(Fault { latency: SHORT, ..Fault::default() });
        let start = Instant::now();
        ask(&mut stream, 1).await.unwrap();
        assert!(start.elapsed() >= 2 * SHORT);

        proxy.fault(Fault { bytes_per_second: Some(10_000), ..Fault::default() });
        let start = Instant::now();
        ask(&mut stream, 1_500).await.unwrap();
        assert!(start.elapsed() >= Duration::from_millis(300), "both ways");

        proxy.fault(Fault { black_hole: true, ..Fault::default() });
        assert!(timeout(SHORT, ask(&mut stream, 1)).await.is_err());
        proxy.heal();
        assert_eq!(stream.read_exact(&mut [0]).await.unwrap(), 1, "what was swallowed arrives");

        proxy.fault(Fault { cut_after: Some(3_000), ..Fault::default() });
        assert!(ask(&mut stream, 1_000).await.is_ok());
        let error = ask(&mut stream, 5_000).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

        proxy.fault(Fault { refuse: true, ..Fault::default() });
        let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(refused.read_exact(&mut [0]).await.is_err());
        proxy.heal();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        ask(&mut stream, 1).await.unwrap();
        proxy.cut();
        assert!(stream.read_exact(&mut [0]).await.is_err());
    }
}
