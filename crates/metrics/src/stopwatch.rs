//! The time of one image's own work. It stands still while the image only waits for others: for a
//! request, for bytes, for a decoder, for its batch. So the limit on an image's time does not
//! depend on how many others are in flight.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

/// A stopwatch. Clones share it.
#[derive(Debug, Clone)]
pub struct Stopwatch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// Until it ran last.
    spent: Duration,
    run: Run,
}

#[derive(Debug, Clone, Copy)]
enum Run {
    Still,
    /// Work began that this many share. Whoever awaits it starts the clock: a back end's thread has
    /// none of tokio's.
    Begun(u32),
    /// Since when, and how many share the work.
    Since(Instant, u32),
}

impl Stopwatch {
    /// Starts at once.
    pub fn started() -> Self {
        let state = State { spent: Duration::ZERO, run: Run::Since(Instant::now(), 1) };
        Self(Arc::new(Shared { state: Mutex::new(state), changed: Notify::new() }))
    }

    /// Stands still until `wait` ends.
    pub async fn waiting<T>(&self, wait: impl Future<Output = T>) -> T {
        self.stop();
        let waited = wait.await;
        self.start();
        waited
    }

    /// Stands still.
    pub fn stop(&self) {
        self.change(Run::Still);
    }

    fn start(&self) {
        self.change(Run::Since(Instant::now(), 1));
    }

    /// Runs from now on, for work that is done for `images` at once: each spends its part of the
    /// time. May be called from any thread.
    pub fn share(&self, images: usize) {
        self.change(Run::Begun(u32::try_from(images).unwrap_or(u32::MAX).max(1)));
    }

    /// Awaits `work` and runs and stands still as `other` does.
    pub async fn following<T>(&self, other: &Self, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        loop {
            let changed = other.0.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match other.state().run {
                Run::Still => self.stop(),
                Run::Begun(_) | Run::Since(..) => self.start(),
            }
            tokio::select! {
                biased;
                done = &mut work => {
                    self.start();
                    return done;
                }
                () = changed => {}
            }
        }
    }

    /// Awaits `work`. `None` if the watch has run for `limit` before that is done.
    pub async fn within<T>(&self, limit: Duration, work: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(work);
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let left = self.left(limit);
            if left == Some(Duration::ZERO) {
                return None;
            }
            tokio::select! {
                biased;
                done = &mut work => return Some(done),
                () = changed => {}
                () = sleep(left.unwrap_or_default()), if left.is_some() => {}
            }
        }
    }

    /// How long until it has run for `limit`, as it runs now. `None` while it stands still.
    fn left(&self, limit: Duration) -> Option<Duration> {
        let mut state = self.state();
        if let Run::Begun(images) = state.run {
            state.run = Run::Since(Instant::now(), images);
        }
        let Run::Since(since, images) = state.run else { return None };
        let left = limit.saturating_sub(state.spent).saturating_mul(images);
        Some(left.saturating_sub(since.elapsed()))
    }

    fn change(&self, run: Run) {
        {
            let mut state = self.state();
            if let Run::Since(since, images) = state.run {
                state.spent += since.elapsed() / images;
            }
            state.run = run;
        }
        self.0.changed.notify_waiters();
    }

    /// Nothing panics while it holds the lock.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;

    const SECOND: Duration = Duration::from_secs(1);

    /// How long `work` was awaited until the watch had run for 10 s.
    async fn given_up(watch: &Stopwatch, work: impl Future<Output = ()>) -> Duration {
        let began = Instant::now();
        assert!(watch.within(10 * SECOND, work).await.is_none());
        began.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_images_own_work_counts() {
        let watch = Stopwatch::started();
        let work = async {
            sleep(4 * SECOND).await;
            watch.waiting(sleep(1000 * SECOND)).await;
            sleep(4 * SECOND).await;
            watch.waiting(sleep(1000 * SECOND)).await;
            pending::<()>().await;
        };
        assert_eq!(given_up(&watch, work).await.as_secs(), 2010);
        assert!(watch.within(10 * SECOND, async {}).await.is_none(), "its time is over");
    }

    #[tokio::test(start_paused = true)]
    async fn of_shared_work_an_image_spends_its_part() {
        let watch = Stopwatch::started();
        let began = Instant::now();
        let work = async {
            sleep(2 * SECOND).await;
            watch.stop();
            sleep(100 * SECOND).await;
            let other = watch.clone();
            std::thread::spawn(move || other.share(32)).join().unwrap();
            pending::<()>().await;
        };
        assert!(watch.within(10 * SECOND, work).await.is_none());
        assert_eq!(began.elapsed().as_secs(), 102 + 8 * 32);
    }

    #[tokio::test(start_paused = true)]
    async fn a_follower_runs_when_the_other_does() {
        let (watch, other) = (Stopwatch::started(), Stopwatch::started());
        let work = async {
            sleep(3 * SECOND).await;
            other.waiting(sleep(1000 * SECOND)).await;
            pending::<()>().await;
        };
        assert_eq!(given_up(&watch, watch.following(&other, work)).await.as_secs(), 1010);
        let again = Stopwatch::started();
        let late = async {
            again.following(&other, async {}).await;
            pending::<()>().await;
        };
        assert_eq!(given_up(&again, late).await.as_secs(), 10);
    }
}
