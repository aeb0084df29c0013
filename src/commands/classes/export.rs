//! `angler classes export`: a version as a file of another tool.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use futures_util::StreamExt;
use serde_json::json;

use angler_core::class_sets::catalog::version_key;
use angler_vectors::ClassVectors;

use super::formats::Format;
use crate::app::App;
use crate::commands::{UsageError, class_set};

/// Write a version into a file for another tool
///
/// The ending of --out says the format: .safetensors (the version's own file as it is), .npy or
/// .npz (f32, [rows, dim], unit rows; the labels lie beside it in NAME.labels.json), or .csv (a
/// header, then a label and its values a line).
#[derive(Args)]
pub struct ExportCommand {
    /// SET[@VERSION] under classes.root, or a class vectors FILE
    #[arg(value_name = "SET[@VERSION]|FILE")]
    classes: String,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Overwrite files that exist
    #[arg(long)]
    force: bool,
    /// Print what was written as JSON
    #[arg(long)]
    json: bool,
}

impl ExportCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let format = Format::of("--out", &self.out)?;
        let labels = format.labels_beside().then(|| self.out.with_extension("labels.json"));
        let files: Vec<&Path> =
            [&self.out].into_iter().chain(&labels).map(PathBuf::as_path).collect();
        self.check(&files)?;
        let as_it_is = format == Format::Safetensors;
        let Version { name, classes, bytes } = find(app, &self.classes, as_it_is).await?;
        tokio::task::block_in_place(|| -> Result<()> {
            write(&self.out, |mut file| match &bytes {
                Some(bytes) => Ok(file.write_all(bytes)?),
                None => format.write(&classes, file),
            })?;
            let Some(path) = &labels else { return Ok(()) };
            let rows = classes.row_classes().iter();
            let all: Vec<&str> = rows.map(|class| classes.labels().get(*class as usize)).collect();
            let text = serde_json::to_vec(&all)?;
            write(path, |mut file| Ok(file.write_all(&text)?))
        })?;
        let (rows, dim) = (classes.vectors().rows(), classes.dim());
        if self.json {
            let report = json!({
                "classes": name, "model": classes.model(), "labels": classes.labels().len(),
                "rows": rows, "dim": dim, "files": files,
            });
            println!("{report}");
        } else {
            let count = classes.labels().len();
            println!("{name}: {count} classes, {rows} vectors of {dim} values");
            let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
            println!("written to {}", names.join(" and "));
        }
        Ok(())
    }

    /// Found now and not when everything is read.
    fn check(&self, files: &[&Path]) -> Result<()> {
        for path in files {
            let place = path.display();
            if path.is_dir() {
                return Err(UsageError(format!("--out {place}: it is a folder")).into());
            }
            if path.exists() && !self.force {
                bail!("{place} exists already: --force overwrites it");
            }
        }
        let folder = self.out.parent().filter(|folder| !folder.as_os_str().is_empty());
        if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
            let (out, folder) = (self.out.display(), folder.display());
            return Err(UsageError(format!("--out {out}: there is no folder {folder}")).into());
        }
        Ok(())
    }
}

/// A version, how it was named, and its own file's bytes if they are asked for.
struct Version {
    name: String,
    classes: Arc<ClassVectors>,
    bytes: Option<Vec<u8>>,
}

async fn find(app: &App, text: &str, bytes_too: bool) -> Result<Version> {
    let classes = class_set::open(app, text).await?;
    let path = Path::new(text);
    // A file on its own has no name but its path.
    let (name, is_file) = match path.is_file() {
        true => (text.to_owned(), true),
        false => (classes.id(), false),
    };
    let bytes = match (bytes_too, is_file) {
        (false, _) => None,
        (true, true) => Some(tokio::fs::read(path).await.with_context(|| text.to_owned())?),
        (true, false) => Some(own_file(app, &classes).await?),
    };
    Ok(Version { name, classes, bytes })
}

/// The bytes of a version under `classes.root`.
async fn own_file(app: &App, classes: &ClassVectors) -> Result<Vec<u8>> {
    let root = app.class_root().await?;
    let key = version_key(classes.set(), classes.version());
    let gone = || format!("{} is gone", root.place(&key));
    let mut object = root.open(&key).await?.with_context(gone)?;
    let mut bytes = Vec::with_capacity(usize::try_from(object.bytes)?);
    while let Some(chunk) = object.chunks.next().await {
        bytes.extend_from_slice(&chunk?);
    }
    Ok(bytes)
}

/// Writes beside the place and renames: no half a file is ever there.
fn write(path: &Path, content: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = path.with_file_name(format!(".{name}.part"));
    let written = File::create(&temporary)
        .map_err(Into::into)
        .and_then(|file| content(&file))
        .and_then(|()| Ok(std::fs::rename(&temporary, path)?));
    if written.is_err() {
        // A leftover is only litter.
        let _ = std::fs::remove_file(&temporary);
    }
    written.with_context(|| format!("{} cannot be written", path.display()))
}
