//! Three workers under the chart's settings, restarted one after another while jobs keep coming.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::chart::{kind, render};
use crate::support::{Broker, Bucket, Setup, Worker, eventually, repository, tiny};

/// Jobs that have no result yet, at most.
const AHEAD: usize = 100;
/// Results that come from the others while one worker is away.
const MEANWHILE: usize = 50;

/// A worker's settings as they are in a pod; what a test has elsewhere is changed.
fn setup(broker: &Broker, folder: &std::path::Path) -> Setup {
    let (documents, findings) = render(&["values-cpu.yaml"], &json!({}));
    assert_eq!(findings, "");
    let text = kind(&documents, "ConfigMap").unwrap()["data"]["angler.toml"].as_str().unwrap();
    let file = folder.join("angler.toml");
    std::fs::write(&file, text).unwrap();
    std::fs::create_dir_all(folder.join("classes/colours")).unwrap();
    std::fs::write(folder.join("classes/colours/1.safetensors"), tiny::version("colours", "1"))
        .unwrap();
    let mut setup = Setup::worker(broker, folder.join("classes").to_str().unwrap());
    setup.set("model.path", repository(tiny::MODEL).to_str().unwrap());
    setup.set("classes.preload", "");
    setup.flags = ["--config", file.to_str().unwrap()].map(str::to_owned).to_vec();
    setup
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_loses_and_doubles_nothing_and_never_stands_still() {
    let (broker, bucket) = (Broker::new().await, Bucket::new().await);
    let folder = tempfile::tempdir().unwrap();
    let setup = setup(&broker, folder.path());
    let images = tiny::images(&bucket).await;
    let mut workers: Vec<Worker> = Vec::new();
    for _ in 0..3 {
        workers.push(setup.start().await);
    }

    let (stop, room) = (CancellationToken::new(), Arc::new(Semaphore::new(AHEAD)));
    let producer = broker.connect().await;
    let (stopped, free) = (stop.clone(), Arc::clone(&room));
    let producing = tokio::spawn(async move {
        let images: Vec<Value> = images.iter().map(|uri| json!({"uri": uri})).collect();
        let mut sent = 0;
        while let Some(Ok(permit)) = stopped.run_until_cancelled(free.acquire()).await {
            permit.forget();
            let id = format!("rolling/{sent}");
            producer.job(&json!({"id": id, "classes": "colours@1", "images": images})).await;
            sent += 1;
        }
        sent
    });
    let done = Arc::new(AtomicUsize::new(0));
    let consumer = broker.connect().await;
    let mut results = consumer.consume("angler.results").await;
    let (counted, free, all) = (Arc::clone(&done), Arc::clone(&room), CancellationToken::new());
    let ended = all.clone();
    let consuming = tokio::spawn(async move {
        let mut times: BTreeMap<String, usize> = BTreeMap::new();
        while let Some(result) = ended.run_until_cancelled(results.next()).await {
            assert_eq!(result.body["status"], "done", "{}", result.body);
            *times.entry(result.body["id"].as_str().unwrap().to_owned()).or_default() += 1;
            counted.fetch_add(1, Ordering::SeqCst);
            free.add_permits(1);
        }
        times
    });
    let more = async |what: &str| {
        let before = done.load(Ordering::SeqCst);
        eventually(what, async || {
            (done.load(Ordering::SeqCst) >= before + MEANWHILE).then_some(())
        })
        .await;
    };
    more("all three work").await;
    for number in 0..3 {
        let mut old = workers.remove(0);
        old.signal("TERM");
        assert!(old.ended().await.success(), "{}", old.log());
        // Two are left, and go on.
        more(&format!("results while worker {number} is away")).await;
        workers.push(setup.start().await);
        more(&format!("results after worker {number} is back")).await;
    }
    stop.cancel();
    let sent = producing.await.unwrap();
    eventually("every job has its result", async || {
        (done.load(Ordering::SeqCst) >= sent).then_some(())
    })
    .await;
    // Stopped before it is counted: what they still had to say is said.
    for mut worker in workers {
        worker.signal("TERM");
        assert!(worker.ended().await.success(), "{}", worker.log());
    }
    all.cancel();
    let times = consuming.await.unwrap();
    assert_eq!(times.len(), sent, "jobs without a result");
    let twice: Vec<&String> = times.iter().filter(|(_, times)| **times > 1).map(|t| t.0).collect();
    assert!(twice.is_empty(), "{twice:?} have more than one result");
    for queue in ["angler.jobs", "angler.suspects", "angler.dead", "angler.results"] {
        // The broker counts with a delay.
        let empty = async || (broker.depth(queue).unwrap_or(0) == 0).then_some(());
        eventually(&format!("{queue} is empty"), empty).await;
    }
}
