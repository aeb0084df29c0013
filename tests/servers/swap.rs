//! Class vectors change while workers serve them: real workers, a real broker, a real store.
//!
//! Whether the pointer's swap is right is the catalog's own test; here it is shown to hold across
//! processes: an operator's command, the announcement, polling, jobs in flight. The model is the
//! mean colour, so that every label is known without running it.
//!
//! `under_load` prints what a swap costs; more of it, and the figures:
//!
//! ```sh
//! ANGLER_SWAP_ACTIVATIONS=50 ANGLER_SWAP_SECONDS=10 ANGLER_SWAP_ROWS=100000 \
//!     cargo nextest run --release --test swap under_load --no-capture
//! ```

mod announcements;
mod gate;
mod operators;
mod pinned;
mod refused;
mod shadow;
mod under_load;
mod world;
