//! Faults of every kind at random, under steady load: in the end every job has one outcome, the
//! right one, and nothing is left anywhere.
//!
//! `tests/soak.sh --minutes N --seed S` runs it for longer than the tests do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the report.

#[path = "../support/mod.rs"]
mod support;

mod faults;
mod load;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use angler::classes::load::version_key;
use tokio_util::sync::CancellationToken;

use crate::faults::{Fleet, Injector};
use crate::load::{Ledger, Load, collect, produce};
use crate::support::proxy::Proxy;
use crate::support::servers::Server;
use crate::support::{Broker, Bucket, Setup, tiny};

const WORKERS: usize = 3;
const JOBS_PER_SECOND: f64 = 12.0;
/// After the last fault, until the last outcome.
const CALM: Duration = Duration::from_secs(120);

fn ask(variable: &str, default: f64) -> f64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_every_job_ends_once() {
    let minutes = ask("ANGLER_SOAK_MINUTES", 0.5);
    let seed = ask("ANGLER_SOAK_SEED", 1.0) as u64;
    let (rabbitmq, seaweedfs) = (Server::rabbitmq("heartbeat = 3\n"), Server::seaweedfs());
    let (broker, endpoint) = (Broker::of(&rabbitmq), seaweedfs.var("ANGLER_TEST_S3_ENDPOINT"));
    let bucket = Bucket::at(&endpoint, "soak").await;
    bucket
        .put(&format!("classes/{}", version_key("colours", "1")), tiny::version("colours", "1"))
        .await;
    bucket.put("classes/colours/active.json", r#"{"version":"1"}"#).await;
    let images = tiny::images(&bucket).await;

    let to_broker = Proxy::new(&broker.address()).await;
    let to_store = Proxy::new(endpoint.trim_start_matches("http://")).await;
    let mut setup = Setup::worker(&broker, "s3://soak/classes");
    setup.env.insert("ANGLER__AMQP__URL".into(), broker.url_through(&to_broker.address(), 3));
    setup.set("model.path", tiny::MODEL).set("embedder.backend", "tract");
    setup.set("s3.endpoint", &format!("http://{}", to_store.address()));
    // More attempts than any fault lasts, so that each job's outcome is known beforehand.
    setup.set("retry.delays_seconds", "0.5,1,2").set("retry.max_attempts", "50");
    let mut fleet = Fleet::start(setup, WORKERS).await;

    let load = Load::new(seed, images);
    load::declare_replies(&broker.url).await;
    let ledger = Arc::new(Ledger::default());
    let (stop_producing, stop_collecting) = (CancellationToken::new(), CancellationToken::new());
    let producing = tokio::spawn(produce(
        broker.url.clone(),
        load,
        Duration::from_secs_f64(1.0 / JOBS_PER_SECOND),
        Arc::clone(&ledger),
        stop_producing.clone(),
    ));
    let collecting =
        tokio::spawn(collect(broker.url.clone(), Arc::clone(&ledger), stop_collecting.clone()));

    let mut injector = Injector::new(seed, &rabbitmq, &seaweedfs, &to_broker, &to_store, &broker);
    let until = Instant::now() + Duration::from_secs_f64(60.0 * minutes);
    while Instant::now() < until {
        injector.one(&mut fleet, &ledger).await;
    }
    stop_producing.cancel();
    producing.await.unwrap();

    // Calm: every job has its outcome.
    let calm = Instant::now();
    while !ledger.missing().is_empty() {
        fleet.look_after();
        assert!(
            calm.elapsed() < CALM,
            "seed {seed}: without an outcome: {:?}, queues {:?}\n{}",
            ledger.missing(),
            broker.depths(),
            fleet.logs()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let quiet = calm.elapsed();
    let left = [
        "angler.jobs",
        "angler.suspects",
        "angler.retry.500ms",
        "angler.retry.1s",
        "angler.retry.2s",
    ];
    support::eventually("nothing is left in any queue", async || {
        left.iter().all(|queue| broker.depth(queue) == Some(0)).then_some(())
    })
    .await;
    let peak = fleet.peak_kib();
    fleet.stop().await;
    stop_collecting.cancel();
    collecting.await.unwrap();

    // Only what cannot be a job is kept for a person.
    let dead = dead_letters(&broker).await;
    let summary = ledger.summary();
    println!("seed {seed}, {minutes} minutes, {WORKERS} workers");
    println!("faults: {:?}", injector.done());
    println!("jobs: {summary:?}");
    println!("last outcome {quiet:.1?} after the last fault");
    println!("first result after a broker's restart: worst of {:.1?}", injector.recoveries());
    println!("peak memory of a worker: {} MB", peak / 1000);
    assert_eq!(ledger.wrong(), Vec::<String>::new(), "seed {seed}");
    let reasons: Vec<&String> = dead.keys().collect();
    assert!(reasons.iter().all(|reason| *reason == "malformed_job"), "seed {seed}: {dead:?}");
    let crashes = injector.explains_duplicates();
    assert!(summary.duplicates == 0 || crashes > 0, "duplicates without a crash: {summary:?}");
}

/// How many dead letters there are, by reason; they are taken.
async fn dead_letters(broker: &Broker) -> BTreeMap<String, usize> {
    let client = broker.connect().await;
    let mut reasons = BTreeMap::new();
    while let Some(dead) = client.get("angler.dead").await {
        *reasons.entry(dead.header("angler-reason").unwrap_or_default()).or_default() += 1;
    }
    reasons
}
