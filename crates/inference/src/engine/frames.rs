//! Where the pixels of a batch lie: each image is written once, into the buffer that the back end
//! reads.
//!
//! A *slab* is one buffer of [N, H, W, 3] bytes, N the most images in a batch. It is split into
//! frames, one an image, which are handed to whoever writes an image (`Frames::claim`) and are
//! his alone until he submits or drops them. When a batch closes, its slab is *sealed*: no more
//! frames of it are handed out, those that are being written are waited for (a frame is claimed
//! only once its image is decoded, so that takes a fraction of a millisecond), and what was written
//! is joined into one piece. Splitting and joining move no bytes ([`BytesMut::split_to`],
//! [`BytesMut::unsplit`]), and need no unsafe code.
//!
//! There are as many slabs as can be in use at once: one that fills, one that waits, and one for
//! each embedder. Their memory is touched only as far as it is written.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::Notify;

/// One image's place in a batch that forms.
pub struct Frame {
    /// None once it was taken.
    part: Option<Part>,
    slab: u64,
    /// How long it took to get it.
    pub(super) waited: Duration,
    frames: Arc<Frames>,
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frame").field("slab", &self.slab).finish_non_exhaustive()
    }
}

impl Frame {
    /// What is to be written, all of it: u8 RGB, [H, W, 3]. It holds whatever was there before.
    pub fn pixels_mut(&mut self) -> &mut [u8] {
        self.part.as_mut().map_or(&mut [], |part| &mut part.bytes)
    }

    /// Which slab it belongs to.
    pub(super) fn slab(&self) -> u64 {
        self.slab
    }

    /// The written frame; none if it was taken before.
    pub(super) fn take(mut self) -> Option<Part> {
        let part = self.part.take()?;
        self.frames.settle(self.slab, None);
        Some(part)
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        if let Some(part) = self.part.take() {
            self.frames.settle(self.slab, Some(part));
        }
    }
}

/// A frame's memory and where in its slab it lies.
pub(super) struct Part {
    pub index: usize,
    bytes: BytesMut,
}

/// A slab of which no more frames are handed out, whose frames are all back.
pub(super) struct Sealed {
    /// The frames that were not written, in no order.
    free: Vec<Part>,
}

/// What the frames that were written became.
pub(super) struct Joined {
    /// [n, H, W, 3], the images in the order of their indices.
    pub pixels: BytesMut,
    /// The rest of the slab.
    rest: BytesMut,
}

/// Frames that are not of use for now.
struct Slab {
    number: u64,
    /// Not handed out; the last is the next.
    free: Vec<Part>,
    /// Handed out and not back.
    writing: usize,
}

#[derive(Default)]
struct State {
    /// The slab that frames are handed out from; none while all are in use.
    filling: Option<Slab>,
    /// The slab that is waited for.
    sealed: Option<Slab>,
    /// Whole slabs that are not in use.
    spare: Vec<BytesMut>,
    /// Slabs that were ever begun.
    begun: u64,
    closed: bool,
}

/// Hands out frames. Never more than `slabs` × `per_slab` are in use.
pub(super) struct Frames {
    frame_bytes: usize,
    state: Mutex<State>,
    /// There may be a frame, or there will be none any more.
    changed: Notify,
    /// A frame of the sealed slab came back.
    settled: Notify,
}

/// What came of a claim.
pub(super) enum Claim {
    /// A frame.
    Frame(Frame),
    /// None for now.
    Wait,
    /// None any more.
    Closed,
}

impl Frames {
    /// `slabs` buffers of `per_slab` frames of `frame_bytes` each.
    pub fn new(slabs: usize, per_slab: usize, frame_bytes: usize) -> Arc<Self> {
        let (per_slab, frame_bytes) = (per_slab.max(1), frame_bytes.max(1));
        // Zeroed memory comes from the system as it is touched.
        let spare = (0..slabs.max(1)).map(|_| BytesMut::zeroed(per_slab * frame_bytes)).collect();
        let frames = Self {
            frame_bytes,
            state: Mutex::new(State { spare, ..State::default() }),
            changed: Notify::new(),
            settled: Notify::new(),
        };
        frames.lock().fill(frame_bytes);
        Arc::new(frames)
    }

    /// A frame, if there is one.
    pub fn try_claim(self: &Arc<Self>) -> Claim {
        let mut state = self.lock();
        if state.closed {
            return Claim::Closed;
        }
        let Some(slab) = &mut state.filling else { return Claim::Wait };
        let Some(part) = slab.free.pop() else { return Claim::Wait };
        slab.writing += 1;
        let (slab, frames) = (slab.number, Arc::clone(self));
        Claim::Frame(Frame { part: Some(part), slab, waited: Duration::ZERO, frames })
    }

    /// A frame as soon as there is one; none if there will be none. Cancel-safe.
    pub async fn claim(self: &Arc<Self>) -> Option<Frame> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Before looking, so that what changes in between is not missed.
            changed.as_mut().enable();
            match self.try_claim() {
                Claim::Frame(frame) => return Some(frame),
                Claim::Closed => return None,
                Claim::Wait => changed.await,
            }
        }
    }

    /// Hands out no more frames of the slab that is filling, but of the next. To be called again
    /// only after [`take_sealed`](Self::take_sealed).
    pub fn seal(&self) {
        {
            let mut state = self.lock();
            state.sealed = state.filling.take();
            state.fill(self.frame_bytes);
        }
        self.changed.notify_waiters();
    }

    /// The sealed slab once all its frames are back; the caller has those that were written.
    pub fn take_sealed(&self) -> Option<Sealed> {
        let mut state = self.lock();
        let slab = state.sealed.take_if(|slab| slab.writing == 0)?;
        Some(Sealed { free: slab.free })
    }

    /// Returns after a frame of the sealed slab came back, perhaps once too often.
    pub async fn settled(&self) {
        self.settled.notified().await;
    }

    /// Takes back the slab of a batch that is done with.
    pub fn recycle(&self, Joined { mut pixels, rest }: Joined) {
        pixels.unsplit(rest);
        {
            let mut state = self.lock();
            state.spare.push(pixels);
            if state.filling.is_none() {
                state.fill(self.frame_bytes);
            }
        }
        self.changed.notify_waiters();
    }

    /// Whoever waits for a frame gets none.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_waiters();
    }

    /// A frame is no longer being written: it was taken, or it comes back unused.
    fn settle(&self, number: u64, unused: Option<Part>) {
        let again = unused.is_some();
        {
            let mut state = self.lock();
            let State { filling, sealed, .. } = &mut *state;
            let slabs = [filling.as_mut(), sealed.as_mut()];
            let Some(slab) = slabs.into_iter().flatten().find(|slab| slab.number == number) else {
                return; // Not reached: a slab is not let go while one of its frames is out.
            };
            slab.writing = slab.writing.saturating_sub(1);
            slab.free.extend(unused);
        }
        self.settled.notify_one();
        if again {
            self.changed.notify_waiters();
        }
    }

    /// Nothing panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Begins the next slab, if one is there.
    fn fill(&mut self, frame_bytes: usize) {
        let Some(mut whole) = self.spare.pop() else { return };
        let frames = whole.len() / frame_bytes;
        let mut free: Vec<Part> =
            (0..frames).map(|index| Part { index, bytes: whole.split_to(frame_bytes) }).collect();
        free.reverse(); // The first is handed out first.
        self.begun += 1;
        self.filling = Some(Slab { number: self.begun, free, writing: 0 });
    }
}

impl Sealed {
    /// Joins what was written into one piece, the `written` in the order of their indices. Where a
    /// frame came back unused in between, the last one written is moved into its place.
    pub fn join<T>(self, written: &mut [(Part, T)]) -> Joined {
        let Self { mut free } = self;
        let count = written.len();
        let mut holes: Vec<usize> = free
            .iter()
            .enumerate()
            .filter(|(_, part)| part.index < count)
            .map(|(at, _)| at)
            .collect();
        for (part, _) in written.iter_mut().filter(|(part, _)| part.index >= count) {
            // As many lie beyond the count as there are holes below it.
            let Some(hole) = holes.pop().and_then(|at| free.get_mut(at)) else { break };
            hole.bytes.copy_from_slice(&part.bytes);
            std::mem::swap(hole, part);
        }
        written.sort_by_key(|(part, _)| part.index);
        free.sort_by_key(|part| part.index);
        let join = |parts: &mut dyn Iterator<Item = BytesMut>| {
            let mut joined = parts.next().unwrap_or_default();
            parts.for_each(|part| joined.unsplit(part));
            joined
        };
        let pixels = join(&mut written.iter_mut().map(|(part, _)| std::mem::take(&mut part.bytes)));
        let rest = join(&mut free.into_iter().map(|part| part.bytes));
        Joined { pixels, rest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: usize = 6;

    fn claim(frames: &Arc<Frames>, value: u8) -> Frame {
        let Claim::Frame(mut frame) = frames.try_claim() else { panic!("no frame") };
        frame.pixels_mut().fill(value);
        frame
    }

    /// Seals, joins and checks that nothing was copied to elsewhere.
    fn batch(frames: &Arc<Frames>, written: Vec<Frame>) -> (Vec<u8>, Joined, Vec<usize>) {
        frames.seal();
        let mut written: Vec<(Part, usize)> =
            written.into_iter().enumerate().map(|(n, f)| (f.take().unwrap(), n)).collect();
        let joined = frames.take_sealed().expect("all are back").join(&mut written);
        let order = written.iter().map(|(_, number)| *number).collect();
        let values = joined.pixels.chunks(FRAME).map(|frame| frame[0]).collect();
        (values, joined, order)
    }

    #[test]
    fn what_was_written_is_one_piece_in_place() {
        let frames = Frames::new(1, 4, FRAME);
        let written: Vec<Frame> = (1..=3).map(|value| claim(&frames, value)).collect();
        let start = written[0].part.as_ref().unwrap().bytes.as_ptr();
        let (values, joined, order) = batch(&frames, written);
        assert_eq!((values, order), (vec![1, 2, 3], vec![0, 1, 2]));
        assert_eq!(joined.pixels.as_ptr(), start);
        assert_eq!((joined.pixels.len(), joined.rest.len()), (3 * FRAME, FRAME));
        assert!(matches!(frames.try_claim(), Claim::Wait), "the only slab is in use");
        frames.recycle(joined);
        let again = claim(&frames, 9);
        assert_eq!(again.part.as_ref().unwrap().bytes.as_ptr(), start);
    }

    #[test]
    fn a_frame_that_comes_back_leaves_no_hole() {
        let frames = Frames::new(1, 4, FRAME);
        let mut written: Vec<Frame> = (1..=4).map(|value| claim(&frames, value)).collect();
        let start = written[0].part.as_ref().unwrap().bytes.as_ptr();
        drop(written.remove(1));
        drop(written.remove(0));
        let (values, joined, order) = batch(&frames, written);
        let mut pairs: Vec<_> = values.into_iter().zip(order).collect();
        pairs.sort_unstable();
        assert_eq!(pairs, [(3, 0), (4, 1)], "the pixels are still those of their images");
        assert_eq!(joined.pixels.as_ptr(), start);
        frames.recycle(joined);
        let all: Vec<Frame> = (0..4).map(|value| claim(&frames, value)).collect();
        assert_eq!(all.len(), 4);
    }

    #[test]
    fn frames_in_whatever_order_are_joined_in_their_own() {
        let frames = Frames::new(1, 3, FRAME);
        let mut written: Vec<Frame> = (1..=3).map(|value| claim(&frames, value)).collect();
        written.rotate_left(1);
        let (values, _, order) = batch(&frames, written);
        assert_eq!((values, order), (vec![1, 2, 3], vec![2, 0, 1]));
    }

    #[tokio::test]
    async fn a_sealed_slab_is_whole_only_when_its_writers_are_done() {
        let frames = Frames::new(2, 2, FRAME);
        let first = claim(&frames, 1);
        let second = claim(&frames, 2);
        assert!(matches!(frames.try_claim(), Claim::Wait), "it is full");
        frames.seal();
        let mut next = claim(&frames, 3);
        assert_ne!(next.slab(), first.slab());
        let mut written = vec![(first.take().unwrap(), 0)];
        assert!(frames.take_sealed().is_none(), "one is being written");
        drop(second);
        frames.settled().await;
        let joined = frames.take_sealed().unwrap().join(&mut written);
        assert_eq!(&joined.pixels[..], [1; FRAME]);
        next.pixels_mut().fill(4);
    }

    #[tokio::test]
    async fn whoever_waits_gets_the_frame_that_comes_back_or_hears_of_the_end() {
        let frames = Frames::new(1, 1, FRAME);
        let only = claim(&frames, 1);
        let waiting = frames.claim();
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        drop(only);
        let only = waiting.await.unwrap();
        let waiting = frames.claim();
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        frames.close();
        assert!(waiting.await.is_none());
        drop(only);
        assert!(matches!(frames.try_claim(), Claim::Closed));
    }
}
