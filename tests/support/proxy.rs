//! A TCP proxy that misbehaves on demand, on loopback.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
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
    accepted: Arc<AtomicUsize>,
    cut_answers: Arc<AtomicUsize>,
    _accepting: AbortOnDropHandle<()>,
}

impl Proxy {
    /// In front of `upstream`, `host:port`.
    pub async fn new(upstream: &str) -> Self {
        Self::at("127.0.0.1:0", upstream).await.unwrap()
    }

    /// The same, with this address of its own.
    pub async fn at(own: &str, upstream: &str) -> std::io::Result<Self> {
        let listener = TcpListener::bind(own).await?;
        let address = listener.local_addr()?;
        let (fault, cuts) = (watch::Sender::new(Fault::default()), watch::Sender::new(0));
        let upstream: Arc<str> = upstream.into();
        let (faults, cut) = (fault.subscribe(), cuts.subscribe());
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&accepted);
        let cut_answers = Arc::new(AtomicUsize::new(usize::MAX));
        let left = Arc::clone(&cut_answers);
        let accepting = tokio::spawn(async move {
            // Ends with the listener: those that are open go with it.
            let mut open = tokio::task::JoinSet::new();
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                count.fetch_add(1, Ordering::SeqCst);
                while open.try_join_next().is_some() {}
                if faults.borrow().refuse {
                    reset(&client);
                    continue;
                }
                let upstream = Arc::clone(&upstream);
                let left = Arc::clone(&left);
                open.spawn(pass(client, upstream, faults.clone(), cut.clone(), left));
            }
        });
        let _accepting = AbortOnDropHandle::new(accepting);
        Ok(Self { address, fault, cuts, accepted, cut_answers, _accepting })
    }

    /// `host:port`.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Connections so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// From now on, for open connections too.
    pub fn fault(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Nothing is wrong any more.
    pub fn heal(&self) {
        self.fault(Fault::default());
    }

    /// Resets connections after `bytes` from the server, `times` in all.
    pub fn cut_answers(&self, bytes: u64, times: usize) {
        self.cut_answers.store(times, Ordering::SeqCst);
        self.fault(Fault { cut_after: Some(bytes), ..Fault::default() });
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
    cut_answers: Arc<AtomicUsize>,
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
        () = pump(from_client, to_server, faults.clone(), None) => {}
        () = pump(from_server, to_client, faults.clone(), Some(&cut_answers)) => {}
        () = cut => {}
    }
}

async fn pump(
    mut from: ReadHalf<TcpStream>,
    mut to: WriteHalf<TcpStream>,
    mut faults: watch::Receiver<Fault>,
    cuts: Option<&AtomicUsize>,
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
        let room = fault.cut_after.map(|after| after.saturating_sub(passed) as usize);
        let part = match (cuts, room) {
            (Some(cuts), Some(room)) if room < read && one_less(cuts) => room,
            _ => read,
        };
        if to.write_all(&chunk[..part]).await.is_err() || part < read {
            return;
        }
        passed += part as u64;
    }
}

/// Takes one from the number; `false` if none is left.
fn one_less(number: &AtomicUsize) -> bool {
    let less = |left: usize| left.checked_sub(1);
    number.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok()
}
