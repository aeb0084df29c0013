//! The files that a run's results become: each whole or not at all, and all of them before the run's
//! queues are deleted.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use angler_runs::embeddings::{EmbeddingFiles, ids_path};
use angler_runs::journal::Journal;
use angler_runs::result::Outcome;
use angler_runs::table::{Format, Rows};

use super::summary::Summary;
use crate::commands::{UsageError, output};

/// Where the results of a run go.
#[derive(Debug, Clone, Copy)]
pub(in crate::commands) struct Files<'a> {
    /// A row an image.
    pub(in crate::commands) out: &'a Path,
    /// The embeddings as `.npy`, and their ids beside it.
    pub(in crate::commands) embeddings: Option<&'a Path>,
}

/// What was written beside `out`.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// The results that could not be read, as they came.
    pub(super) unreadable: Option<PathBuf>,
}

impl Files<'_> {
    /// Whether they can be written, before there is anything to write.
    ///
    /// # Errors
    /// What is wrong with which flag.
    pub(in crate::commands) fn check(&self) -> Result<(), UsageError> {
        output::check("--out", Some(self.out))?;
        Format::of(self.out).map_err(UsageError::of)?;
        let Some(embeddings) = self.embeddings else { return Ok(()) };
        output::check("--embeddings-out", Some(embeddings))?;
        match embeddings.extension().is_some_and(|ending| ending == "npy") {
            true => Ok(()),
            false => Err(UsageError(format!(
                "--embeddings-out {}: embeddings are written as .npy",
                embeddings.display()
            ))),
        }
    }

    /// The journal's results as the files that were asked for.
    pub(super) fn write(&self, journal: &mut Journal, summary: &Summary) -> Result<Written> {
        let format = Format::of(self.out).map_err(UsageError::of)?;
        let mut rows =
            Rows::new(format, &summary.embeddings, begin("--out", self.out)?).context("--out")?;
        let mut vectors = self.embeddings.map(|path| begin_vectors(path, summary)).transpose()?;
        let aside = self.out.with_extension("unreadable.jsonl");
        let mut unreadable: Option<BufWriter<NamedTempFile>> = None;
        journal.read(|_, result, line| {
            if matches!(result.outcome, Outcome::Unreadable { .. }) {
                let file = match &mut unreadable {
                    Some(file) => file,
                    None => unreadable.insert(begin("--out", &aside)?),
                };
                file.write_all(line)?;
                file.write_all(b"\n")?;
            }
            rows.write(&result)?;
            if let Some(vectors) = &mut vectors {
                for entry in result.images() {
                    if let Some(embedding) = entry.embedding() {
                        let id = entry.id.as_ref().filter(|id| !id.is_empty());
                        vectors.push(id.unwrap_or(&entry.uri), embedding)?;
                    }
                }
            }
            anyhow::Ok(())
        })?;
        // All are whole on the disk before the first of them appears.
        let rows = synced(rows.finish()?)?;
        let vectors = match vectors {
            Some(vectors) => {
                let (matrix, ids) = vectors.finish().context("--embeddings-out")?;
                Some((synced(matrix)?, synced(ids)?))
            }
            None => None,
        };
        let unreadable = unreadable.map(synced).transpose()?;
        if let (Some(path), Some((matrix, ids))) = (self.embeddings, vectors) {
            // A matrix beside ids of another one would be believed: the old one goes first, so that
            // there is never one that does not fit.
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| path.display().to_string());
                }
                _ => {}
            }
            appear(ids, &ids_path(path))?;
            appear(matrix, path)?;
        }
        let mut written = Written::default();
        if let Some(unreadable) = unreadable {
            appear(unreadable, &aside)?;
            written.unreadable = Some(aside);
        }
        appear(rows, self.out)?;
        Ok(written)
    }
}

type Vectors = EmbeddingFiles<BufWriter<NamedTempFile>, BufWriter<NamedTempFile>>;

fn begin_vectors(path: &Path, summary: &Summary) -> Result<Vectors> {
    if summary.embeddings.rows == 0 {
        bail!("{}", no_embeddings());
    }
    let (matrix, ids) =
        (begin("--embeddings-out", path)?, begin("--embeddings-out", &ids_path(path))?);
    EmbeddingFiles::new(&summary.embeddings, matrix, ids).context("--embeddings-out")
}

/// What is said of a run without embeddings.
pub(super) fn no_embeddings() -> String {
    "the results hold no embeddings: the run was enqueued without --embeddings. Nothing is lost: the same command without --embeddings-out writes the rest".to_owned()
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A file beside its place.
fn begin(flag: &str, path: &Path) -> Result<BufWriter<NamedTempFile>> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".angler-");
    // It becomes a file like any other: whoever may read it is the umask's to say.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.tempfile_in(folder(path));
    let file = file.with_context(|| format!("{flag} {}", path.display()))?;
    Ok(BufWriter::with_capacity(1 << 16, file))
}

fn synced(writer: BufWriter<NamedTempFile>) -> Result<NamedTempFile> {
    let file = writer.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    file.as_file().sync_all()?;
    Ok(file)
}

/// The file in its place, safe there.
fn appear(file: NamedTempFile, path: &Path) -> Result<()> {
    file.persist(path).with_context(|| path.display().to_string())?;
    File::open(folder(path))?.sync_all().with_context(|| path.display().to_string())
}
