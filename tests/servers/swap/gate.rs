//! A gate in front of the test store: reads of some objects are held until it is opened. What
//! passes is not touched, so that the store sees the requests as they were signed.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::support::{DEADLINE, var};

pub struct Gate {
    pub url: String,
    open: watch::Sender<bool>,
    came: watch::Sender<usize>,
    _task: AbortOnDropHandle<()>,
}

/// What a connection knows of its gate.
#[derive(Clone)]
struct Watched {
    needle: String,
    open: watch::Receiver<bool>,
    came: watch::Sender<usize>,
}

impl Gate {
    /// A closed gate for reads of keys that end in `key`.
    pub async fn before(key: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let endpoint = var("ANGLER_TEST_S3_ENDPOINT");
        let store: SocketAddr = endpoint.strip_prefix("http://").unwrap().parse().unwrap();
        let (open, came) = (watch::Sender::new(false), watch::Sender::new(0));
        let watched =
            Watched { needle: format!("{key}?"), open: open.subscribe(), came: came.clone() };
        let task = tokio::spawn(async move {
            // A connection's task ends with the connection, or with the test's runtime.
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(pass(stream, store, watched.clone()));
            }
        });
        Self { url, open, came, _task: AbortOnDropHandle::new(task) }
    }

    /// Waits until this many reads have come, and are held if the gate is closed.
    pub async fn reached(&self, reads: usize) {
        let mut came = self.came.subscribe();
        let enough = tokio::time::timeout(DEADLINE, came.wait_for(|n| *n >= reads)).await;
        enough.unwrap_or_else(|_| panic!("{} reads came, not {reads}", self.reads())).unwrap();
    }

    /// How many reads came so far.
    pub fn reads(&self) -> usize {
        *self.came.borrow()
    }

    /// Lets go of what is held, and of all that comes.
    pub fn open(&self) {
        self.open.send_replace(true);
    }
}

async fn pass(client: TcpStream, store: SocketAddr, mut watched: Watched) {
    let store = TcpStream::connect(store).await.unwrap();
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_store, mut to_store) = store.into_split();
    let _answers =
        AbortOnDropHandle::new(tokio::spawn(
            async move { copy(&mut from_store, &mut to_client).await },
        ));
    let mut chunk = vec![0; 64 * 1024];
    // A request's head is one write, and what is held has no body.
    while let Ok(length @ 1..) = from_client.read(&mut chunk).await {
        let line = chunk[..length].split(|byte| *byte == b'\r').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        if line.starts_with("GET ") && line.contains(&watched.needle) {
            watched.came.send_modify(|n| *n += 1);
            if watched.open.wait_for(|open| *open).await.is_err() {
                return;
            }
        }
        if to_store.write_all(&chunk[..length]).await.is_err() {
            return;
        }
    }
}
