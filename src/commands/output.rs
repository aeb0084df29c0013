//! Where a command's JSON lines go: a file that appears when it is complete, a pipe, or nowhere
//! because a person looks at a table.

use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use super::UsageError;

/// Whether the file of this flag can be written, before there is anything to write.
pub(super) fn check(flag: &str, out: Option<&Path>) -> Result<(), UsageError> {
    if let Some(out) = out {
        let wrong = |what: String| UsageError(format!("{flag} {}: {what}", out.display()));
        if out.is_dir() || out.file_name().is_none() {
            return Err(wrong("it is a folder".to_owned()));
        }
        let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
        if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
            return Err(wrong(format!("there is no folder {}", folder.display())));
        }
    }
    Ok(())
}

/// Where JSON lines go.
pub(super) enum Output {
    /// A terminal: a table at the end instead.
    Table,
    /// Standard output, in a pipe.
    Pipe,
    /// A file, written beside its place and renamed when it is complete.
    File { path: PathBuf, temporary: PathBuf, file: std::fs::File },
}

/// What is left to do once everything is written; dropped before, it leaves no half a file behind.
pub(super) struct Finish(Option<(PathBuf, PathBuf)>);

pub(super) type Writer = Option<Box<dyn Write + Send>>;

impl Output {
    pub(super) fn open(out: Option<&Path>) -> Result<Self> {
        let path = match out {
            None if std::io::stdout().is_terminal() => return Ok(Self::Table),
            None => return Ok(Self::Pipe),
            Some(path) if path == Path::new("-") => return Ok(Self::Pipe),
            Some(path) => path,
        };
        let name =
            path.file_name().ok_or_else(|| anyhow!("--out {}: not a file", path.display()))?;
        let temporary = path.with_file_name(format!(".{}.part", name.to_string_lossy()));
        let file = std::fs::File::create(&temporary)
            .with_context(|| format!("--out {}", path.display()))?;
        Ok(Self::File { path: path.to_owned(), temporary, file })
    }

    pub(super) fn is_table(&self) -> bool {
        // With --out on a terminal the table is shown as well.
        !matches!(self, Self::Pipe) && std::io::stdout().is_terminal()
    }

    pub(super) fn split(self) -> Result<(Writer, Finish)> {
        Ok(match self {
            Self::Table => (None, Finish(None)),
            Self::Pipe => {
                let writer = BufWriter::new(std::io::stdout());
                (Some(Box::new(writer)), Finish(None))
            }
            Self::File { path, temporary, file } => {
                (Some(Box::new(BufWriter::new(file))), Finish(Some((temporary, path))))
            }
        })
    }
}

impl Finish {
    pub(super) fn complete(mut self) -> Result<()> {
        match self.0.take() {
            Some((from, to)) => std::fs::rename(&from, &to)
                .with_context(|| format!("{} cannot become {}", from.display(), to.display())),
            None => Ok(()),
        }
    }
}

impl Drop for Finish {
    fn drop(&mut self) {
        if let Some((temporary, _)) = &self.0 {
            // A leftover is only litter.
            let _ = std::fs::remove_file(temporary);
        }
    }
}
