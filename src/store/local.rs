//! Folders and files: the small adapter that specifies what a store does.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;

use super::{ByteBudget, Fetched, ImageStore, ObjectError, ObjectStore};
use crate::error::{ImageError, ImageErrorCode};

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

/// Class sets under a folder.
#[derive(Debug, Clone)]
pub struct LocalObjects {
    root: PathBuf,
}

impl LocalObjects {
    /// Objects under `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }
}

#[async_trait]
impl ObjectStore for LocalObjects {
    fn place(&self, key: &str) -> String {
        self.root.join(key).display().to_string()
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>, ObjectError> {
        match tokio::fs::read(self.root.join(key)).await {
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                Ok(None)
            }
            Err(e) => Err(ObjectError::Unavailable(format!("{}: {e}", self.place(key)))),
        }
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<(), ObjectError> {
        let path = self.root.join(key);
        let place = self.place(key);
        tokio::task::spawn_blocking(move || create_new(&path, &body))
            .await
            .map_err(|e| ObjectError::Unavailable(format!("{place}: {e}")))?
            .map_err(|e| match e.kind() {
                ErrorKind::AlreadyExists => ObjectError::Exists(place),
                _ => ObjectError::Unavailable(format!("{place}: {e}")),
            })
    }
}

/// Written beside its place and then linked there: a link fails if the name is taken, and nobody
/// ever sees half a file.
fn create_new(path: &Path, body: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // A name that no other writer has: not in this process, and not on another host of the folder.
    let temporary =
        folder.join(format!(".{name}.{}.{:016x}", std::process::id(), fastrand::u64(..)));
    let written = std::fs::File::create_new(&temporary).and_then(|mut file| {
        file.write_all(body)?;
        file.sync_all()?;
        std::fs::hard_link(&temporary, path)
    });
    // A leftover is only litter; the outcome that counts is `written`.
    let _ = std::fs::remove_file(&temporary);
    written
}
