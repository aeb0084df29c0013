//! Which images a command is about: paths and `s3://` prefixes made into lists.
//!
//! In a folder a file counts as an image by its ending or, failing that, by its first bytes, so
//! that neither a README becomes an error nor an image without an ending is passed over.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use walkdir::WalkDir;

use angler_core::class_sets::build::Reference;
use angler_storage::s3::S3Uri;

use crate::app::{App, is_s3};

const ENDINGS: [&str; 10] =
    ["jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif"];

pub(super) fn has_image_ending(name: &str) -> bool {
    let ending = name.rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase());
    ending.is_some_and(|ending| ENDINGS.contains(&ending.as_str()))
}

/// The images of the paths, sorted within each. A path that is a file is taken as it is.
pub(super) async fn images(app: &App, paths: &[String]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for path in paths {
        let before = found.len();
        if is_s3(path) {
            found.extend(in_s3(app, path).await?);
        } else {
            let path = path.clone();
            found.extend(tokio::task::spawn_blocking(move || in_folder(&path)).await??);
        }
        if found.len() == before {
            bail!("{path} holds no image");
        }
    }
    Ok(found)
}

fn in_folder(path: &str) -> Result<Vec<String>> {
    let metadata = std::fs::metadata(path).with_context(|| path.to_owned())?;
    if metadata.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut images = Vec::new();
    let visible =
        |e: &walkdir::DirEntry| e.depth() == 0 || !e.file_name().to_string_lossy().starts_with('.');
    for entry in
        WalkDir::new(path).follow_links(true).sort_by_file_name().into_iter().filter_entry(visible)
    {
        let entry = entry?;
        if !entry.file_type().is_file() {
            continue;
        }
        let name = entry.file_name().to_string_lossy();
        if has_image_ending(&name) || begins_like_image(entry.path()) {
            let text = entry.path().to_str();
            let text = text.ok_or_else(|| anyhow!("{} is not UTF-8", entry.path().display()))?;
            images.push(text.to_owned());
        }
    }
    Ok(images)
}

/// A file that cannot be opened counts: its error belongs into the results.
fn begins_like_image(path: &Path) -> bool {
    let mut start = Vec::with_capacity(64);
    match std::fs::File::open(path).and_then(|file| file.take(64).read_to_end(&mut start)) {
        Ok(_) => image::guess_format(&start).is_ok(),
        Err(_) => true,
    }
}

async fn in_s3(app: &App, uri: &str) -> Result<Vec<String>> {
    let prefix = S3Uri::parse(uri)?;
    let listed = app.s3_images().await?.list(&prefix).await?;
    // What is named in full is taken as it is.
    if listed.iter().any(|found| found == uri) {
        return Ok(vec![uri.to_owned()]);
    }
    Ok(listed.into_iter().filter(|uri| has_image_ending(uri)).collect())
}

/// The images of a folder or prefix that has one sub-folder a class.
pub(super) async fn references(app: &App, root: &str) -> Result<Vec<Reference>> {
    let root = if root == "/" { root } else { root.trim_end_matches('/') };
    let base = format!("{}/", root.trim_end_matches('/'));
    let listed = if is_s3(root) {
        in_s3(app, &base).await?
    } else {
        let path = root.to_owned();
        tokio::task::spawn_blocking(move || in_folder(&path)).await??
    };
    let references: Vec<Reference> = listed
        .into_iter()
        .filter_map(|uri| {
            let below = uri.strip_prefix(&base)?;
            let (label, _) = below.split_once('/').filter(|(label, _)| !label.is_empty())?;
            Some(Reference { label: label.to_owned(), uri: uri.clone() })
        })
        .collect();
    if references.is_empty() {
        bail!("{root} holds no classes: it needs one sub-folder of images a class");
    }
    Ok(references)
}
