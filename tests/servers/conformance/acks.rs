//! Acks of many jobs in few frames: seen on the wire between the source and a real broker.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use angler_core::source::{Delivery, JobSource, Settlement};

use super::job_source::{Amqp, World, end, id, job, receive, receive_any};
use super::soon;
use crate::support::eventually;
use crate::support::proxy::Proxy;

/// A `basic.ack` as the broker gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ack {
    tag: u64,
    multiple: bool,
}

/// Passes connections to the broker and reads along what it is told.
struct Wire {
    address: String,
    acks: Arc<Mutex<Vec<Ack>>>,
    _passing: AbortOnDropHandle<()>,
}

impl Wire {
    async fn to(broker: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let acks = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&acks);
        let passing = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&broker).await.unwrap();
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let seen = Arc::clone(&seen);
                open.spawn(async move {
                    let _ = tokio::io::copy(&mut from_server, &mut to_client).await;
                });
                open.spawn(async move {
                    let mut header = [0; 8]; // that of the protocol
                    from_client.read_exact(&mut header).await.unwrap();
                    to_server.write_all(&header).await.unwrap();
                    // Type, channel, size; so many bytes; an end mark.
                    while from_client.read_exact(&mut header[..7]).await.is_ok() {
                        let size = u32::from_be_bytes(header[3..7].try_into().unwrap());
                        let mut frame = vec![0; size as usize + 1];
                        from_client.read_exact(&mut frame).await.unwrap();
                        // A method: class 60, method 80, the tag, bits.
                        if header[0] == 1 && frame.starts_with(&[0, 60, 0, 80]) {
                            let tag = u64::from_be_bytes(frame[4..12].try_into().unwrap());
                            seen.lock().unwrap().push(Ack { tag, multiple: frame[12] & 1 == 1 });
                        }
                        let frame = [&header[..7], &frame].concat();
                        if to_server.write_all(&frame).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { address, acks, _passing: AbortOnDropHandle::new(passing) }
    }

    /// All so far, once so many have gone by: an ack that is written has yet to come here.
    async fn acks(&self, jobs: usize) -> Vec<Ack> {
        let passed = || {
            let acks = self.acks.lock().unwrap().clone();
            let mut acked = BTreeSet::new();
            for Ack { tag, multiple } in &acks {
                acked.extend(if *multiple { 1..=*tag } else { *tag..=*tag });
            }
            (acked.len() >= jobs).then_some(acks)
        };
        soon("the acks have gone by", async {
            loop {
                match passed() {
                    Some(acks) => return acks,
                    None => tokio::task::yield_now().await,
                }
            }
        })
        .await
    }
}

const JOBS: usize = 100;

/// A source behind a wire, and its deliveries of so many jobs: their tags are 1, 2, 3…
async fn held(world: &Amqp) -> (Wire, Box<dyn JobSource>, Vec<Delivery>) {
    for number in 1..=JOBS {
        world.push(&job(&number.to_string())).await;
    }
    let wire = Wire::to(world.broker().address()).await;
    let url = world.broker().url_through(&wire.address, 10);
    let mut source = world.source_at(&url, JOBS as u16);
    let mut held = Vec::new();
    for number in 1..=JOBS {
        let delivery = receive(&mut source).await;
        assert_eq!(id(&delivery), number.to_string());
        held.push(delivery);
    }
    (wire, source, held)
}

async fn ack_all(deliveries: impl IntoIterator<Item = Delivery>) {
    let acks = deliveries.into_iter().map(|delivery| delivery.settle.settle(Settlement::Ack));
    soon("all are acked", join_all(acks)).await;
}

#[tokio::test]
async fn jobs_that_are_settled_at_the_same_time_share_their_acks() {
    let world = Amqp::new().await;
    let (wire, source, mut deliveries) = held(&world).await;
    // Alone, it is acked at once and alone.
    ack_all([deliveries.remove(0)]).await;
    assert_eq!(wire.acks(1).await, [Ack { tag: 1, multiple: false }]);
    deliveries.reverse();
    ack_all(deliveries).await;
    let acks = wire.acks(JOBS).await;
    assert!(acks.len() <= 10, "{} frames for {JOBS} jobs", acks.len());
    assert_eq!(acks.last(), Some(&Ack { tag: JOBS as u64, multiple: true }));
    end(source).await;
    assert!(world.take_waiting().await.is_empty());
}

#[tokio::test]
async fn an_ack_for_many_covers_none_that_is_not_settled() {
    let world = Amqp::new().await;
    let (wire, source, deliveries) = held(&world).await;
    // The 31st is worked on for long; later some are given up, as by a worker that dies.
    let mut rest = deliveries;
    let mut later = rest.split_off(31);
    let slow = rest.pop().unwrap();
    ack_all(rest).await;
    let given_up: Vec<Delivery> = [60, 30, 0].map(|n| later.remove(n)).into();
    let unsettled: BTreeSet<String> = given_up.iter().map(id).collect();
    ack_all(later).await;
    let acks = wire.acks(JOBS - 1 - 3).await;
    let singly = acks.iter().filter(|ack| ack.tag > 31 && !ack.multiple).count();
    assert_eq!(singly, JOBS - 31 - 3, "{acks:?}");
    ack_all([slow]).await;
    // 1 to 30 together, and 31 by itself: it is the last before one that is not settled.
    let acks = wire.acks(JOBS - 3).await;
    assert_eq!(acks.last(), Some(&Ack { tag: 31, multiple: false }));
    assert!(acks.len() < JOBS - 3);
    drop(given_up);
    end(source).await;
    let back: BTreeSet<String> = world.take_waiting().await.into_iter().map(text).collect();
    assert_eq!(back, unsettled);
}

fn text(id: Vec<u8>) -> String {
    String::from_utf8(id).unwrap()
}

#[tokio::test]
async fn acks_that_a_lost_connection_took_along_are_missed_by_no_job() {
    let world = Amqp::new().await;
    let jobs = 300;
    for number in 0..jobs {
        world.push(&job(&number.to_string())).await;
    }
    let proxy = Proxy::new(&world.broker().address()).await;
    let mut source = world.source_at(&world.broker().url_through(&proxy.address(), 10), 50);
    let done = Arc::new(Mutex::new(BTreeSet::new()));
    let (seen, stop) = (Arc::clone(&done), CancellationToken::new());
    let stopped = stop.clone();
    let worker = tokio::spawn(async move {
        let mut settling = tokio::task::JoinSet::new();
        while let Some(delivery) = stopped.run_until_cancelled(receive_any(&mut source)).await {
            let seen = Arc::clone(&seen);
            settling.spawn(async move {
                let job = id(&delivery);
                // As a worker does it: what is lost is let go.
                tokio::select! {
                    _ = delivery.settle.settle(Settlement::Ack) => {}
                    () = delivery.lost.cancelled() => {}
                }
                seen.lock().unwrap().insert(job);
            });
        }
        soon("all are settled", settling.join_all()).await;
        end(source).await;
    });
    for part in 1..=5 {
        eventually("some are done", async || {
            (done.lock().unwrap().len() > 40 * part).then_some(())
        })
        .await;
        proxy.cut();
    }
    eventually("all are done and acked", async || {
        let depths = ["angler.jobs", "angler.suspects"].map(|queue| world.broker().depth(queue));
        (depths == [Some(0); 2] && done.lock().unwrap().len() == jobs).then_some(())
    })
    .await;
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(60), worker).await.unwrap().unwrap();
    assert!(world.take_waiting().await.is_empty());
}
