//! The store in front of a real one: many who ask for an object at once make one request, and
//! requests share their connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::sync::Semaphore;

use angler_core::store::shared::SharedImages;
use angler_core::store::{ByteBudget, Fetched, ImageStore};
use angler_storage::s3::{S3Images, S3Options};
use angler_wire::error::ImageError;

use super::soon;
use crate::support::proxy::Proxy;
use crate::support::{Bucket, s3_client_at, var};

/// Counts what reaches the store behind it, and holds it until it is let through.
struct Counted {
    store: S3Images,
    fetches: AtomicUsize,
    gate: Semaphore,
}

#[async_trait]
impl ImageStore for Counted {
    async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        self.gate.acquire().await.unwrap().forget();
        self.store.fetch(uri, budget).await
    }
}

/// 32 requests at once, as `s3.concurrency` has it.
fn options() -> S3Options {
    S3Options { concurrency: 32, ..S3Options::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_who_ask_at_once_make_one_request() {
    let bucket = Bucket::new().await;
    let body: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    let uri = bucket.put("popular.jpg", body.clone()).await;
    let missing = format!("s3://{}/missing.jpg", bucket.name);
    let store = Arc::new(Counted {
        store: S3Images::new(bucket.client.clone(), &options()),
        fetches: AtomicUsize::new(0),
        gate: Semaphore::new(0),
    });
    let images = SharedImages::new(store.clone());
    let budget = ByteBudget::new(0, 300_000);
    let fetched = soon("all have it", hundred(&images, &uri, &budget, &store.gate)).await;
    for fetched in &fetched {
        assert!(fetched.as_ref().unwrap().bytes == body);
    }
    assert_eq!(store.fetches.load(Ordering::SeqCst), 1);
    // The budget has room for one of them.
    drop(fetched);
    drop(soon("the budget is whole again", budget.reserve(300_000)).await.unwrap());
    let errors = soon("all know", hundred(&images, &missing, &budget, &store.gate)).await;
    assert!(errors.iter().all(Result::is_err));
    assert_eq!(store.fetches.load(Ordering::SeqCst), 2);
}

/// A hundred have asked before the store answers.
async fn hundred(
    images: &SharedImages,
    uri: &str,
    budget: &ByteBudget,
    gate: &Semaphore,
) -> Vec<Result<Fetched, ImageError>> {
    let mut waiting: Vec<_> = (0..100).map(|_| images.fetch(uri, budget)).collect();
    for fetch in &mut waiting {
        assert!(futures_util::poll!(fetch).is_pending());
    }
    gate.add_permits(1);
    join_all(waiting).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_used_again() {
    let endpoint = var("ANGLER_TEST_S3_ENDPOINT");
    let bucket = Bucket::new().await;
    let proxy = Proxy::new(endpoint.trim_start_matches("http://")).await;
    let (key, secret) = (var("ANGLER_TEST_S3_KEY"), var("ANGLER_TEST_S3_SECRET"));
    let client = s3_client_at(&format!("http://{}", proxy.address()), &key, &secret);
    let images = Arc::new(S3Images::new(client, &options()));
    let budget = ByteBudget::new(64 << 20, 1 << 20);
    // In one chunk, and in many; what is missing has a body too.
    let small = bucket.put("small", vec![7; 10_000]).await;
    let large = bucket.put("large", vec![7; 400_000]).await;
    let missing = format!("s3://{}/missing", bucket.name);
    let fetches = (0..600).map(|n| {
        let (images, budget) = (Arc::clone(&images), budget.clone());
        let uri = [&small, &large, &missing][n % 3].clone();
        tokio::spawn(async move { images.fetch(&uri, &budget).await.is_ok() })
    });
    let fetched = soon("all are fetched", join_all(fetches)).await;
    assert_eq!(fetched.into_iter().filter(|ok| *ok.as_ref().unwrap()).count(), 400);
    // One that is free while another is being opened is taken, and the other is kept for later: a
    // few more than 32 may be opened.
    let opened = proxy.accepted();
    assert!((1..=64).contains(&opened), "{opened} connections for 600 requests, 32 at once");
}
