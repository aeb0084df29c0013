//! One request for an image that many ask for at once.
//!
//! Jobs repeat images: a product's photo in a hundred jobs, one placeholder in a thousand. Who asks
//! for a URI while a request for it is under way joins that *flight* and gets its outcome. The bytes
//! are there once, and so is their share of the byte budget, until the last user is done with them.
//! Nothing is kept beyond the flight: the next to ask gets what the store holds then.
//!
//! A flight belongs to all who wait for it. It runs in their tasks, whichever is awake, so a caller
//! that gives up (its time is over, its job is lost) takes it from nobody; with the last one the
//! request ends. How long to wait is each caller's own affair.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};

use angler_metrics::stopwatch::Stopwatch;
use angler_wire::error::{ImageError, ImageErrorCode};

use super::{ByteBudget, Fetched, ImageStore};

type Request = BoxFuture<'static, Result<Fetched, ImageError>>;

/// An [`ImageStore`] in front of another, which fetches no URI twice at the same time.
pub struct SharedImages {
    store: Arc<dyn ImageStore>,
    flights: Arc<Flights>,
}

/// The flights under way: each has a caller who waits, so there are no more than images in flight.
#[derive(Default)]
struct Flights(Mutex<Open>);

#[derive(Default)]
struct Open {
    by_uri: HashMap<Arc<str>, Flight>,
    /// Flights so far, which numbers them.
    count: u64,
}

struct Flight {
    number: u64,
    /// What the bytes are charged to: callers of another budget do not join.
    budget: ByteBudget,
    /// Its own work: stands still while it waits for other flights.
    watch: Stopwatch,
    /// Weak, so that it ends with the last who waits for it.
    request: WeakShared<Request>,
}

/// Takes a flight off the list when it ends, whatever its end is.
struct Landing {
    flights: Arc<Flights>,
    uri: Arc<str>,
    number: u64,
}

impl SharedImages {
    /// In front of `store`.
    pub fn new(store: Arc<dyn ImageStore>) -> Self {
        Self { store, flights: Arc::default() }
    }

    /// The flight under way for this URI, or a new one.
    fn join(&self, uri: &str, budget: &ByteBudget) -> (Shared<Request>, Stopwatch) {
        let mut open = self.flights.open();
        if let Some(flight) = open.by_uri.get(uri)
            && flight.budget.is_same(budget)
            && let Some(request) = flight.request.upgrade()
        {
            return (request, flight.watch.clone());
        }
        open.count += 1;
        let (number, uri) = (open.count, Arc::<str>::from(uri));
        let landing = Landing { flights: Arc::clone(&self.flights), uri: Arc::clone(&uri), number };
        let watch = Stopwatch::started();
        let request = request(Arc::clone(&self.store), budget.timed_by(&watch), landing).shared();
        if let Some(weak) = request.downgrade() {
            let flight =
                Flight { number, budget: budget.clone(), watch: watch.clone(), request: weak };
            open.by_uri.insert(uri, flight);
        }
        (request, watch)
    }
}

/// A panic is an error like any other here: it must reach all who wait.
fn request(store: Arc<dyn ImageStore>, budget: ByteBudget, landing: Landing) -> Request {
    let request = async move {
        // Before the outcome is there: nobody may join a flight that is over.
        let landing = landing;
        let fetch = AssertUnwindSafe(store.fetch(&landing.uri, &budget)).catch_unwind();
        fetch.await.unwrap_or_else(|_| {
            let message = "the store's client panicked on this image";
            Err(ImageError::new(ImageErrorCode::Internal, message))
        })
    };
    request.boxed()
}

#[async_trait]
impl ImageStore for SharedImages {
    async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError> {
        // A statement of its own: the lock is free again while the flight is awaited.
        let (request, watch) = self.join(uri, budget);
        budget.as_runs(&watch, request).await
    }

    /// Never shared: a flight under way may have been admitted before the credentials changed.
    async fn probe(&self, uri: &str, budget: &ByteBudget) -> Result<(), ImageError> {
        self.store.probe(uri, budget).await
    }
}

impl Flights {
    /// Nothing panics while it holds the lock.
    fn open(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut open = self.flights.open();
        // Another may have set off in between.
        if open.by_uri.get(&self.uri).is_some_and(|flight| flight.number == self.number) {
            open.by_uri.remove(&self.uri);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use futures_util::future::join_all;
    use tokio::sync::Semaphore;
    use tokio::time::timeout;
    use tokio_util::task::AbortOnDropHandle;

    /// Ten bytes for every URI, once the gate lets it; an error or a panic for those named so.
    struct Store {
        gate: Semaphore,
        requests: AtomicUsize,
        under_way: AtomicUsize,
    }

    struct Inside<'a>(&'a AtomicUsize);
    impl Drop for Inside<'_> {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    #[async_trait]
    impl ImageStore for Store {
        async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError> {
            self.requests.fetch_add(1, Ordering::SeqCst);
            self.under_way.fetch_add(1, Ordering::SeqCst);
            let _inside = Inside(&self.under_way);
            let permit = budget.reserve(10).await?;
            self.gate.acquire().await.unwrap().forget();
            assert!(uri != "panic", "as it was told to");
            if uri == "error" {
                return Err(ImageError::new(ImageErrorCode::StorageUnavailable, "as told"));
            }
            Ok(Fetched { bytes: vec![7; 10].into(), permit })
        }
    }

    type Outcome = Result<Fetched, ImageError>;

    struct World {
        store: Arc<Store>,
        images: Arc<SharedImages>,
        budget: ByteBudget,
    }

    impl World {
        fn new() -> Self {
            let store = Arc::new(Store {
                gate: Semaphore::new(0),
                requests: AtomicUsize::new(0),
                under_way: AtomicUsize::new(0),
            });
            let images = Arc::new(SharedImages::new(store.clone()));
            Self { store, images, budget: ByteBudget::new(10, 10) }
        }

        fn fetch(&self, uri: &'static str) -> AbortOnDropHandle<Outcome> {
            let (images, budget) = (Arc::clone(&self.images), self.budget.clone());
            AbortOnDropHandle::new(tokio::spawn(async move { images.fetch(uri, &budget).await }))
        }

        /// Callers who all wait.
        async fn fetch_many(&self, uri: &'static str) -> Vec<AbortOnDropHandle<Outcome>> {
            let fetches = (0..100).map(|_| self.fetch(uri)).collect();
            self.quiet().await;
            fetches
        }

        /// The clock is paused: it moves once nothing else can.
        async fn quiet(&self) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }

        fn requests(&self) -> usize {
            self.store.requests.load(Ordering::SeqCst)
        }

        fn is_empty(&self) -> bool {
            self.images.flights.open().by_uri.is_empty()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn many_who_ask_at_once_share_a_request_its_bytes_and_its_budget() {
        let world = World::new();
        let fetches = world.fetch_many("a").await;
        assert_eq!(world.requests(), 1);
        world.store.gate.add_permits(1);
        let mut all: Vec<Fetched> =
            join_all(fetches).await.into_iter().map(|f| f.unwrap().unwrap()).collect();
        assert_eq!(all.len(), 100);
        assert!(all.iter().all(|f| f.bytes.as_ptr() == all[0].bytes.as_ptr()), "a copy was made");
        // The budget has room for one image: it is full until the last of the hundred is done.
        let last = all.pop().unwrap();
        drop(all);
        let more = world.budget.reserve(1);
        tokio::pin!(more);
        assert!(futures_util::poll!(&mut more).is_pending());
        drop(last);
        assert!(futures_util::poll!(&mut more).is_ready());
        assert!(world.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_kept_beyond_the_flight() {
        let world = World::new();
        world.store.gate.add_permits(2);
        let first = world.fetch("a").await.unwrap().unwrap();
        drop(first);
        world.fetch("a").await.unwrap().unwrap();
        assert_eq!(world.requests(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn other_uris_and_other_budgets_are_other_flights() {
        let mut world = World::new();
        world.budget = ByteBudget::new(100, 10);
        let fetches = [world.fetch("a"), world.fetch("b")];
        world.budget = ByteBudget::new(100, 10);
        let other = [world.fetch("a"), world.fetch("a")];
        world.quiet().await;
        assert_eq!(world.requests(), 3);
        world.store.gate.add_permits(3);
        for fetch in fetches.into_iter().chain(other) {
            fetch.await.unwrap().unwrap();
        }
        assert!(world.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_and_a_panic_go_to_all_who_wait_and_to_nobody_later() {
        for (uri, code) in
            [("error", ImageErrorCode::StorageUnavailable), ("panic", ImageErrorCode::Internal)]
        {
            let world = World::new();
            let fetches = world.fetch_many(uri).await;
            world.store.gate.add_permits(1);
            for fetch in fetches {
                assert_eq!(fetch.await.unwrap().unwrap_err().code, code);
            }
            assert_eq!(world.requests(), 1);
            drop(world.budget.reserve(10).await.unwrap());
            let again = world.fetch(uri);
            world.quiet().await;
            assert_eq!(world.requests(), 2);
            drop(again);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_takes_the_request_from_nobody_and_the_last_one_ends_it() {
        let world = World::new();
        let first = world.fetch("a"); // It is the one that began the request.
        world.quiet().await;
        let mut others = world.fetch_many("a").await;
        drop(first);
        others.truncate(50);
        world.quiet().await;
        world.store.gate.add_permits(1);
        for other in others {
            other.await.unwrap().unwrap();
        }
        assert_eq!(world.requests(), 1);
        // Nobody waits any more: the request ends, and its share of the budget is free.
        let given_up = world.fetch_many("a").await;
        assert_eq!(world.store.under_way.load(Ordering::SeqCst), 1);
        drop(given_up);
        drop(world.budget.reserve(10).await.unwrap());
        assert_eq!(world.store.under_way.load(Ordering::SeqCst), 0);
        assert!(world.is_empty());
        // And the next begins anew.
        world.store.gate.add_permits(1);
        world.fetch("a").await.unwrap().unwrap();
        assert_eq!(world.requests(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn each_waits_as_long_as_it_likes() {
        let world = World::new();
        let patient = world.fetch("a");
        world.quiet().await;
        // It joins late, and its own time ends first.
        let mut hurried = world.fetch("a");
        assert!(timeout(Duration::from_secs(5), &mut hurried).await.is_err());
        drop(hurried);
        world.store.gate.add_permits(1);
        assert_eq!(patient.await.unwrap().unwrap().bytes.len(), 10);
        assert_eq!(world.requests(), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_caller_is_forgotten_when_threads_race() {
        let mut world = World::new();
        // Room for a flight each: an outcome that nobody has looked at yet holds its share.
        world.budget = ByteBudget::new(320, 10);
        world.store.gate.add_permits(Semaphore::MAX_PERMITS / 2);
        for round in 0..200 {
            let fetches: Vec<_> = (0..32).map(|_| world.fetch("a")).collect();
            for (number, fetch) in fetches.into_iter().enumerate() {
                if (round + number) % 5 == 0 {
                    drop(fetch); // given up at any moment
                } else {
                    let fetched = timeout(Duration::from_secs(30), fetch).await;
                    fetched.expect("a caller was forgotten").unwrap().unwrap();
                }
            }
        }
        // All of it is free again.
        let _all = join_all((0..32).map(|_| world.budget.reserve(10))).await;
        assert!(world.is_empty());
    }
}
