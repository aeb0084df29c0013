//! A decoder's panic costs its image only, and nothing of it is printed: the file is bad, and its
//! result says so.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::Once;

use angler_wire::error::{ImageError, ImageErrorCode};

use super::stored::corrupt;

/// The folder of this crate's sources, as panics name it.
const OURS: &str = {
    let (folder, _) = file!().split_at(file!().len() - "guard.rs".len());
    folder
};

thread_local! {
    /// `true` while a decoder runs on this thread.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
    /// The file whose code panicked last on this thread.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs a decoder. A panic of its is `CorruptImage`; one of this crate's own code is `Internal`.
pub(super) fn guarded<T>(
    name: &str,
    decode: impl FnOnce() -> Result<T, ImageError>,
) -> Result<T, ImageError> {
    hook();
    GUARDED.set(true);
    let decoded = catch_unwind(AssertUnwindSafe(decode));
    GUARDED.set(false);
    decoded.unwrap_or_else(|_| {
        Err(if PLACE.take().starts_with(OURS) {
            ImageError::new(ImageErrorCode::Internal, format!("the {name} decoder panicked"))
        } else {
            corrupt(format!("{name} file is damaged: its decoder panicked"))
        })
    })
}

/// Keeps panics of guarded code from the process's hook, once and for all threads.
fn hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic: &PanicHookInfo<'_>| {
            if GUARDED.get() {
                let file = panic.location().map_or("", |location| location.file());
                PLACE.replace(file.to_owned());
            } else {
                usual(panic);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_the_files_fault_unless_it_is_ours() {
        let ours = guarded::<()>("GIF", || panic!("ours")).unwrap_err();
        assert_eq!(ours.code, ImageErrorCode::Internal);
        let theirs = guarded::<()>("GIF", || {
            std::panic::resume_unwind(Box::new("theirs"));
        });
        assert_eq!(theirs.unwrap_err().code, ImageErrorCode::CorruptImage);
        assert_eq!(guarded("GIF", || Ok(7)), Ok(7));
    }
}
