//! The proxy itself: that its faults are faults, and end.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::support::proxy::{Fault, Proxy};

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
