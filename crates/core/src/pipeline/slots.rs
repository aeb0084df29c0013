//! Places for images in flight: as many as are finished within seconds.
//!
//! A job's time runs from its admission. With many more places than a slow worker fills in that time, jobs
//! would be admitted long before their first image is worked on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::pace::{InHand, Pace, Rule};

/// The work that is in flight should be finished within this time.
const WITHIN: Duration = Duration::from_secs(10);

/// The ends that the rate is measured over: several batches.
const ENDS: u32 = 128;

pub(super) struct Slots {
    places: Arc<Semaphore>,
    pace: Pace,
    /// Places to take away, from those that come free.
    surplus: Mutex<usize>,
}

/// An image's place among those in flight.
pub struct Slot {
    slots: Arc<Slots>,
    place: Option<OwnedSemaphorePermit>,
    in_hand: Option<InHand>,
}

impl Slots {
    pub fn new(least: usize, most: usize) -> Arc<Self> {
        let most = most.max(1);
        let rule = Rule { within: WITHIN, least: least.clamp(1, most), most, ends: ENDS };
        Arc::new(Self {
            places: Arc::new(Semaphore::new(most)),
            pace: Pace::new(rule),
            surplus: Mutex::new(0),
        })
    }

    /// Waits for a place.
    pub async fn take(self: &Arc<Self>) -> Slot {
        match Arc::clone(&self.places).acquire_owned().await {
            Ok(place) => Slot {
                slots: Arc::clone(self),
                place: Some(place),
                in_hand: Some(self.pace.begin()),
            },
            // The semaphore is never closed.
            Err(_) => std::future::pending().await,
        }
    }

    /// Follows the rate.
    fn follow(&self) {
        let Some((before, now)) = self.pace.change() else { return };
        tracing::debug!(places = now, "images in flight follow the rate");
        let mut surplus = self.surplus.lock().unwrap_or_else(PoisonError::into_inner);
        if now > before {
            let kept = (now - before).min(*surplus);
            *surplus -= kept;
            self.places.add_permits(now - before - kept);
        } else {
            *surplus += before - now;
            *surplus -= self.places.forget_permits(*surplus);
        }
    }

    /// Returns a place, or takes it away.
    fn free(&self, place: OwnedSemaphorePermit) {
        let mut surplus = self.surplus.lock().unwrap_or_else(PoisonError::into_inner);
        if *surplus > 0 {
            *surplus -= 1;
            place.forget();
        }
    }
}

impl Slot {
    /// Its image is done, and not just given up.
    pub(super) fn finished(mut self) {
        if let Some(in_hand) = self.in_hand.take() {
            in_hand.finished();
        }
        self.slots.follow();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.slots.free(place);
        }
    }
}
