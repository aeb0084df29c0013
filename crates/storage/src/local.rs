//! Folders and files: the small adapter that specifies what a store does.

use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use angler_core::store::{
    ByteBudget, ETag, Fetched, Got, ImageStore, Listed, Object, ObjectError, ObjectStore,
    SMALL_OBJECT_BYTES,
};
use angler_wire::error::{ImageError, ImageErrorCode, Reason};
use angler_wire::job::hex;

/// Images as files; a URI is a path.
#[derive(Debug, Clone, Copy, Default)]
pub struct LocalImages;

#[async_trait]
impl ImageStore for LocalImages {
    async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError> {
        let metadata = tokio::fs::metadata(uri).await.map_err(|e| image_error(uri, &e))?;
        if !metadata.is_file() {
            return Err(ImageError::new(ImageErrorCode::BadUri, format!("{uri} is not a file")));
        }
        let permit = budget.reserve(metadata.len()).await?;
        let bytes = tokio::fs::read(uri).await.map_err(|e| image_error(uri, &e))?;
        // A file that grew in between does not escape the limit.
        if bytes.len() as u64 > metadata.len() {
            return Err(budget.too_large(&format!("more than {}", metadata.len())));
        }
        Ok(Fetched { bytes: bytes.into(), permit })
    }
}

fn image_error(path: &str, error: &std::io::Error) -> ImageError {
    let code = match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => ImageErrorCode::NotFound,
        ErrorKind::PermissionDenied => ImageErrorCode::AccessDenied,
        ErrorKind::InvalidInput | ErrorKind::InvalidFilename => ImageErrorCode::BadUri,
        _ => ImageErrorCode::StorageUnavailable,
    };
    ImageError::new(code, format!("{path}: {error}"))
}

/// How long a writer waits for another that holds the lock; one write takes milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// The bytes of a chunk: few enough to hold, enough that a trip to a blocking thread does not count.
const CHUNK_BYTES: u64 = 1 << 20;

/// Class sets under a folder, also one that several hosts share.
///
/// * A new object is written under a hidden name and linked to its own: a link fails if the name is
///   taken, and nobody ever sees half a file.
/// * To replace one, a writer takes the lock of `.NAME.lock` beside it, compares, and renames its
///   file over the old one. The system frees the lock of a writer that dies. The lock's file stays:
///   were it removed, two writers could hold the locks of two files of one name.
/// * An ETag is the SHA-256 of the content.
#[derive(Debug, Clone)]
pub struct LocalObjects {
    root: PathBuf,
}

impl LocalObjects {
    /// Objects under `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Does `work` on a key's path, on a thread that may block.
    async fn at<T: Send + 'static>(
        &self,
        key: &str,
        work: impl FnOnce(&Path) -> Result<T, ObjectError> + Send + 'static,
    ) -> Result<T, ObjectError> {
        let path = self.root.join(key);
        blocking(self.place(key), move || work(&path)).await
    }

    /// The lock on replacing a key, free again when the file is dropped.
    async fn lock(&self, key: &str) -> Result<File, ObjectError> {
        let file = self.at(key, |path| open_lock(path).map_err(|e| unavailable(path, e))).await?;
        let deadline = Instant::now() + LOCK_WAIT;
        loop {
            let reason = match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    // Writers that met once must not meet at each try.
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(2..12))).await;
                    continue;
                }
                Err(TryLockError::WouldBlock) => Reason::from(format!(
                    "{}: another writer has held its lock for {} s: try again when it is done",
                    self.place(key),
                    LOCK_WAIT.as_secs()
                )),
                Err(TryLockError::Error(e)) => {
                    Reason::new(format!("{}: it cannot be locked", self.place(key)), e)
                }
            };
            return Err(ObjectError::Unavailable(reason));
        }
    }
}

#[async_trait]
impl ObjectStore for LocalObjects {
    fn place(&self, key: &str) -> String {
        self.root.join(key).display().to_string()
    }

    async fn get(&self, key: &str, known: Option<&ETag>) -> Result<Got, ObjectError> {
        let got = self.at(key, read_small).await?;
        Ok(match got {
            Got::Object { etag, .. } if known == Some(&etag) => Got::Unchanged,
            got => got,
        })
    }

    async fn open(&self, key: &str) -> Result<Option<Object>, ObjectError> {
        let opened = self.at(key, |path| open_file(path).map_err(|e| unavailable(path, e))).await?;
        let Some((file, bytes)) = opened else { return Ok(None) };
        let reading = Reading { file, left: bytes, place: self.place(key) };
        let chunks = stream::try_unfold(Some(reading), |reading| async {
            let Some(reading) = reading else { return Ok(None) };
            blocking(reading.place.clone(), || reading.next()).await
        });
        Ok(Some(Object { bytes, chunks: chunks.boxed() }))
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<(), ObjectError> {
        self.at(key, move |path| {
            write_whole(path, &body, |new, path| std::fs::hard_link(new, path)).map_err(|e| match e
                .kind()
            {
                ErrorKind::AlreadyExists => ObjectError::Exists(path.display().to_string()),
                _ => unavailable(path, e),
            })
        })
        .await
    }

    async fn replace(
        &self,
        key: &str,
        body: Bytes,
        expected: Option<&ETag>,
    ) -> Result<ETag, ObjectError> {
        ObjectError::unless_small(body.len() as u64, || self.place(key))?;
        let lock = self.lock(key).await?;
        let expected = expected.cloned();
        self.at(key, move |path| {
            // Held until the file is in place, even if nobody waits for it any more.
            let _lock = lock;
            replace_if(path, &body, expected.as_ref())
        })
        .await
    }

    async fn list(&self, folder: &str) -> Result<Vec<Listed>, ObjectError> {
        self.at(folder, |path| match list(path) {
            Err(e) if is_missing(&e) => Ok(Vec::new()),
            listed => listed.map_err(|e| unavailable(path, e)),
        })
        .await
    }
}

/// Does `work` on a thread that may block; `place` is for the message if that thread panics.
async fn blocking<T: Send + 'static>(
    place: String,
    work: impl FnOnce() -> Result<T, ObjectError> + Send + 'static,
) -> Result<T, ObjectError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(ObjectError::Unavailable(Reason::new(place, e))))
}

fn unavailable(path: &Path, error: io::Error) -> ObjectError {
    ObjectError::Unavailable(Reason::new(path.display().to_string(), error))
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// A file and its length; none if there is none, or something that is no file.
fn open_file(path: &Path) -> io::Result<Option<(File, u64)>> {
    // Before it is opened: opening a pipe waits for its writer.
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Ok(None),
        Err(e) if is_missing(&e) => return Ok(None),
        found => found?,
    };
    let file = match File::open(path) {
        Err(e) if is_missing(&e) => return Ok(None),
        file => file?,
    };
    // The length of what was opened: another file may have taken the name since.
    let bytes = file.metadata()?.len();
    Ok(Some((file, bytes)))
}

fn read_small(path: &Path) -> Result<Got, ObjectError> {
    let Some((file, bytes)) = open_file(path).map_err(|e| unavailable(path, e))? else {
        return Ok(Got::Missing);
    };
    let place = || path.display().to_string();
    ObjectError::unless_small(bytes, place)?;
    let mut content = Vec::new();
    // One more than allowed, so that a file that grows in between is noticed.
    let read = file.take(SMALL_OBJECT_BYTES + 1).read_to_end(&mut content);
    read.map_err(|e| unavailable(path, e))?;
    ObjectError::unless_small(content.len() as u64, place)?;
    let etag = etag(&content);
    Ok(Got::Object { bytes: content.into(), etag })
}

fn etag(content: &[u8]) -> ETag {
    ETag::new(hex(&Sha256::digest(content)))
}

/// A file that is being read, with the bytes that it should still have.
struct Reading {
    file: File,
    left: u64,
    place: String,
}

impl Reading {
    /// The next chunk, and what is to be read after it; none at the end.
    fn next(mut self) -> Result<Option<(Bytes, Option<Self>)>, ObjectError> {
        let wanted = self.left.min(CHUNK_BYTES);
        let last = wanted == self.left;
        // With the last chunk one byte more is asked for, to see that there is none.
        let ask = wanted + u64::from(last);
        let mut chunk = Vec::with_capacity(usize::try_from(ask).unwrap_or(0));
        let read = Read::by_ref(&mut self.file).take(ask).read_to_end(&mut chunk);
        let changed = match read {
            Ok(read) if (read as u64) < wanted => "it ends before its length: it was cut off",
            Ok(read) if read as u64 > wanted => "it goes on after its length: it grew",
            Ok(0) => return Ok(None),
            Ok(_) => {
                self.left -= wanted;
                return Ok(Some((chunk.into(), (!last).then_some(self))));
            }
            Err(e) => return Err(ObjectError::Unavailable(Reason::new(self.place, e))),
        };
        let reason = format!("{}: {changed} while it was read", self.place);
        Err(ObjectError::Unavailable(reason.into()))
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A name beside a file's that no key has.
fn hidden(path: &Path, suffix: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    folder_of(path).join(format!(".{name}.{suffix}"))
}

/// Makes the folder of a file.
fn make_folder(path: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder_of(path)).map_err(|e| match e.kind() {
        // It is the folder's name that is taken, not the file's.
        ErrorKind::AlreadyExists => ErrorKind::NotADirectory.into(),
        _ => e,
    })
}

fn open_lock(path: &Path) -> io::Result<File> {
    make_folder(path)?;
    let lock = hidden(path, "lock");
    match File::options().create(true).truncate(false).write(true).open(&lock) {
        // Another user's file can be locked all the same.
        Err(e) if e.kind() == ErrorKind::PermissionDenied => File::open(&lock),
        opened => opened,
    }
}

/// Compare and swap, for who holds the lock.
fn replace_if(path: &Path, body: &[u8], expected: Option<&ETag>) -> Result<ETag, ObjectError> {
    let changed = || ObjectError::Changed(path.display().to_string());
    let written = match (read_small(path), expected) {
        (Ok(Got::Object { etag, .. }), Some(expected)) if etag == *expected => {
            write_whole(path, body, |new, path| std::fs::rename(new, path))
        }
        // By a link: it does not overwrite what `create`, which takes no lock, has just made.
        (Ok(Got::Missing), None) => {
            write_whole(path, body, |new, path| std::fs::hard_link(new, path))
        }
        // What is too large is not what was expected.
        (Ok(_) | Err(ObjectError::TooLarge(_)), _) => return Err(changed()),
        (Err(error), _) => return Err(error),
    };
    match written {
        Ok(()) => Ok(etag(body)),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(changed()),
        Err(e) => Err(unavailable(path, e)),
    }
}

/// Writes under a hidden name, brings it onto the disk, and has `publish` give it its own name.
fn write_whole(
    path: &Path,
    body: &[u8],
    publish: impl FnOnce(&Path, &Path) -> io::Result<()>,
) -> io::Result<()> {
    make_folder(path)?;
    // A name that no other writer has: not in this process, and not on another host of the folder.
    let temporary = hidden(path, &format!("{}.{:016x}", std::process::id(), fastrand::u64(..)));
    let written = File::create_new(&temporary).and_then(|mut file| {
        file.write_all(body)?;
        file.sync_all()?;
        publish(&temporary, path)
    });
    // A leftover is only litter; the outcome that counts is `written`.
    let _ = std::fs::remove_file(&temporary);
    written?;
    // So that the name outlives a power cut too. Some file systems cannot; the object is there.
    let _ = File::open(folder_of(path)).and_then(|folder| folder.sync_all());
    Ok(())
}

fn list(folder: &Path) -> io::Result<Vec<Listed>> {
    let mut listed = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        // No key is anything but UTF-8.
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.starts_with('.') {
            continue;
        }
        // Through links: in some deployments every file of a mounted folder is one.
        let metadata = match std::fs::metadata(entry.path()) {
            Err(e) if is_missing(&e) => continue, // removed meanwhile, or a link to nothing
            metadata => metadata?,
        };
        if metadata.is_dir() {
            listed.push(Listed::Folder { name });
        } else if metadata.is_file() {
            let (bytes, modified) = (metadata.len(), metadata.modified()?);
            listed.push(Listed::Object { name, bytes, modified });
        }
    }
    listed.sort_by(|a, b| a.name().cmp(b.name()));
    Ok(listed)
}
