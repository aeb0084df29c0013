//! One suite for every adapter: what each port promises, asked of each adapter that keeps it.
//!
//! The suites know a port and a [`World`](image_store::World) around it: how things get in beside
//! the adapter, and how to look at what it left. The local adapters need no server; the others
//! need those of `tests/run.sh`.

use std::future::Future;
use std::time::Duration;

/// Makes a module of tests out of a suite's checks and the world of one adapter.
macro_rules! suite {
    ($adapter:ident, $world:expr, [$($check:ident),+ $(,)?]) => {
        mod $adapter {
            $(
                #[tokio::test]
                async fn $check() {
                    super::$check(&$world.await).await;
                }
            )+
        }
    };
}

mod acks;
mod folder_source;
mod image_store;
mod job_source;
mod object_store;
mod result_sink;
mod s3_answers;
mod shared_store;

/// The outcome of what must not take long.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(30), future).await {
        Ok(value) => value,
        Err(_) => panic!("not within 30 s: {what}"),
    }
}
