//! Several addresses in `amqp.url`: nodes that refuse, say nothing or go away.

use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};

use angler_amqp::{AmqpOptions, connect};

use crate::faults::ledger::Ledger;
use crate::faults::world::World;
use crate::support::proxy::{Fault, Proxy};
use crate::support::{Broker, eventually, http_get};

fn options(url: String) -> AmqpOptions {
    AmqpOptions {
        url,
        ca_file: None,
        client_cert_file: None,
        client_key_file: None,
        name: "test".to_owned(),
    }
}

/// The broker's URL at other addresses, joined by commas.
fn list(broker: &Broker, addresses: &[&str]) -> String {
    let urls = addresses.iter().map(|address| broker.url.replace(&broker.address(), address));
    urls.collect::<Vec<_>>().join(",")
}

/// What the worker says of the broker that its jobs come from.
fn used(worker: &str) -> Option<String> {
    let (_, status) = http_get(&format!("{worker}/status"))?;
    let status: Value = serde_json::from_str(&status).ok()?;
    Some(status["brokers"]["angler.jobs"].as_str()?.to_owned())
}

/// Takes connections, and says nothing.
struct Silent(TcpListener);

impl Silent {
    async fn new() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (Self(listener), address)
    }

    /// The connections that wait to be accepted.
    async fn connections(&self) -> Vec<TcpStream> {
        let mut all = Vec::new();
        while let Ok(accepted) =
            tokio::time::timeout(Duration::from_millis(100), self.0.accept()).await
        {
            all.push(accepted.unwrap().0);
        }
        all
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_refuses_or_says_nothing_holds_no_connection_up_and_keeps_none() {
    let broker = Broker::new().await;
    let (silent, at) = Silent::new().await;
    let url = list(&broker, &[&at, "127.0.0.1:1", &broker.address(), &at]);
    // The order is random: of so many some begin with the silent one.
    let connecting = (0..20).map(|_| {
        let options = options(url.clone());
        tokio::spawn(async move { connect(&options, "try").await })
    });
    // One address alone is given 15 s; with two silent ones a connection takes 4 s at most.
    let all = tokio::time::timeout(
        Duration::from_secs(14),
        futures_util::future::try_join_all(connecting.collect::<Vec<_>>()),
    );
    let connections = all.await.expect("no connection waits for the silent node").unwrap();
    for connection in &connections {
        assert!(connection.as_ref().unwrap().status().connected());
    }
    let left = silent.connections().await;
    assert!(!left.is_empty(), "20 times none began with the silent one");
    for mut stream in left {
        // The end comes behind the few bytes that a client says first.
        let mut said = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut said));
        let ended = end.await.expect("the attempt that nobody waits for is ended");
        assert!(ended.is_err() || said.len() < 100, "{said:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_with_a_silent_and_a_refusing_node_is_ready_and_works() {
    let mut world = World::new().await;
    let (_silent, at) = Silent::new().await;
    let url = list(&world.broker, &[&at, "127.0.0.1:1", &world.broker.address()]);
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url);
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let (mut results, mut ledger) = (client.consume("angler.results").await, Ledger::default());
    let ids = world.jobs(&client, "listed", 5).await;
    ledger.collect(&mut results, &ids).await;
    assert_eq!((ledger.all_done(), ledger.duplicates), (1, 0));
    let shown = format!("amqp://{}/{}", world.broker.address(), world.broker.vhost);
    assert_eq!(used(&worker.http), Some(shown.clone()));
    let log = worker.log();
    assert!(log.contains(&shown) && log.contains(&at) && !log.contains("guest"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_node_goes_away_goes_to_another() {
    let mut world = World::new().await;
    let [one, other] =
        [Proxy::new(&world.broker.address()).await, Proxy::new(&world.broker.address()).await];
    let url = list(&world.broker, &[&one.address(), &other.address()]);
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url);
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let (mut results, mut ledger) = (client.consume("angler.results").await, Ledger::default());
    for round in 0..4 {
        let at = used(&worker.http).unwrap();
        let (gone, left) =
            if at.contains(&one.address()) { (&one, &other) } else { (&other, &one) };
        gone.fault(Fault { refuse: true, ..Fault::default() });
        gone.cut();
        eventually("jobs come from the other node", async || {
            used(&worker.http)?.contains(&left.address()).then_some(())
        })
        .await;
        let ids = world.jobs(&client, &format!("round{round}"), 5).await;
        ledger.collect(&mut results, &ids).await;
        gone.heal();
    }
    ledger.all_done();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ipv6_address_is_what_is_connected_to() {
    let broker = Broker::new().await;
    let proxy = match Proxy::at("[::1]:0", &broker.address()).await {
        Ok(proxy) => proxy,
        Err(error) => return println!("no IPv6 here: {error}"),
    };
    let connection = connect(&options(list(&broker, &[&proxy.address()])), "try").await.unwrap();
    assert!(connection.status().connected());
    assert_eq!(proxy.accepted(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_heartbeat_is_ten_seconds_unless_the_url_names_another() {
    let broker = Broker::new().await;
    for (parameter, seconds) in [("", 10), ("?heartbeat=7", 7), ("?heartbeat=0", 60)] {
        let url = format!("{}{parameter}", broker.url);
        let connection = connect(&options(url), "try").await.unwrap();
        assert_eq!(connection.configuration().heartbeat(), seconds, "{parameter}");
    }
}
