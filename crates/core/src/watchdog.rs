//! Notices work that does not move: a decoder or a back end that hangs holds its thread for ever,
//! and no deadline ends it.
//!
//! Waiting for a broker or a store is not watched: both have deadlines, and a restart would not
//! bring them back.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use angler_metrics::progress::Step;

/// Looks at the steps for as long as it is awaited, and tells `say` where work is stuck, or none
/// once it moves again.
pub async fn watch(steps: Vec<Arc<Step>>, patience: Duration, say: impl Fn(Option<String>)) {
    let mut stuck_before = false;
    loop {
        sleep(patience / 10).await;
        let stuck: Vec<String> = steps.iter().filter_map(|step| step.stuck(patience)).collect();
        if stuck.is_empty() != stuck_before {
            continue;
        }
        stuck_before = !stuck.is_empty();
        if stuck_before {
            let stuck = stuck.join("; ");
            tracing::error!("no progress (limits.stall_seconds): {stuck}");
            say(Some(stuck));
        } else {
            tracing::info!("work moves again");
            say(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tokio_util::task::AbortOnDropHandle;

    const PATIENCE: Duration = Duration::from_secs(100);

    #[tokio::test(start_paused = true)]
    async fn what_does_not_move_is_said_and_what_moves_again_too() {
        let (decoding, embedding) =
            (Step::new("image(s) being decoded"), Step::new("batch(es) being embedded"));
        let said = Arc::new(Mutex::new(Vec::new()));
        let (steps, heard) = (vec![Arc::clone(&decoding), Arc::clone(&embedding)], said.clone());
        let say = move |stuck| heard.lock().unwrap().push(stuck);
        let _watch = AbortOnDropHandle::new(tokio::spawn(watch(steps, PATIENCE, say)));
        // Idle for long, then at work without a pause longer than the patience.
        sleep(10 * PATIENCE).await;
        let stuck = decoding.enter();
        for _ in 0..20 {
            let moving = decoding.enter();
            sleep(PATIENCE / 2).await;
            drop(moving);
        }
        assert!(said.lock().unwrap().is_empty());
        let _also = decoding.enter();
        let embedded = embedding.enter();
        sleep(PATIENCE / 2).await;
        drop(embedded);
        sleep(PATIENCE).await;
        let first = said.lock().unwrap().pop().unwrap().unwrap();
        assert!(first.starts_with("2 image(s) being decoded, none finished for 1"), "{first}");
        sleep(10 * PATIENCE).await;
        assert!(said.lock().unwrap().is_empty(), "said once");
        drop(stuck);
        sleep(PATIENCE / 2).await;
        assert_eq!(*said.lock().unwrap(), [None]);
    }
}
