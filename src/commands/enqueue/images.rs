//! Which images a run has: those of an S3 prefix, or of a list.

use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use futures_util::StreamExt;
use globset::{Glob, GlobSet, GlobSetBuilder};

use angler_runs::manifest;
use angler_runs::manifest::Format;
use angler_runs::spool::{Images, Spool};
use angler_storage::s3::S3Uri;
use angler_wire::error::Reason;

use super::Enqueue;
use crate::app::{App, is_s3};
use crate::commands::UsageError;
use crate::commands::image_paths::has_image_ending;
use crate::commands::progress::progress_bar;

impl Enqueue {
    /// All images, on disk.
    pub(super) async fn images(&self, app: &App) -> Result<Images> {
        let spool = Spool::new().context("the list of images cannot be kept")?;
        if !is_s3(&self.source) {
            return self.local(spool).await;
        }
        let uri = S3Uri::parse(&self.source).map_err(UsageError::of)?;
        match self.format.map(Format::from).or_else(|| Format::of(&uri.key)) {
            Some(format) => self.list_in_s3(app, &uri, format, spool).await,
            None => self.prefix(app, &uri, spool).await,
        }
    }

    async fn local(&self, mut spool: Spool) -> Result<Images> {
        self.no_globs()?;
        let (source, given) = (self.source.clone(), self.format.map(Format::from));
        let reading = tokio::task::spawn_blocking(move || {
            if source == "-" {
                let format = given.unwrap_or(Format::Text);
                let input = std::io::stdin().lock();
                manifest::read(input, format, "standard input", &mut spool, fetchable)?;
                return anyhow::Ok(spool.finish()?);
            }
            let path = PathBuf::from(&source);
            if path.is_dir() {
                let wrong = format!(
                    "{source} is a folder: workers fetch images from S3, so name s3://bucket/prefix or a list of URIs"
                );
                return Err(UsageError(wrong).into());
            }
            let file = std::fs::File::open(&path).with_context(|| source.clone())?;
            let format = given.or_else(|| Format::of(&source)).unwrap_or(Format::Text);
            manifest::read_file(file, format, &source, &mut spool, fetchable)?;
            Ok(spool.finish()?)
        });
        reading.await?
    }

    async fn list_in_s3(
        &self,
        app: &App,
        uri: &S3Uri,
        format: Format,
        mut spool: Spool,
    ) -> Result<Images> {
        self.no_globs()?;
        let object = app.bucket(&uri.bucket).await?.open(&uri.key).await?;
        let mut object = object.ok_or_else(|| anyhow!("{} does not exist", self.source))?;
        let mut file = tempfile::tempfile()?;
        while let Some(chunk) = object.chunks.next().await {
            let chunk = chunk?;
            tokio::task::block_in_place(|| file.write_all(&chunk))?;
        }
        file.seek(SeekFrom::Start(0))?;
        let place = self.source.clone();
        let reading = tokio::task::spawn_blocking(move || {
            manifest::read_file(file, format, &place, &mut spool, fetchable)?;
            anyhow::Ok(spool.finish()?)
        });
        reading.await?
    }

    async fn prefix(&self, app: &App, prefix: &S3Uri, mut spool: Spool) -> Result<Images> {
        let (include, exclude) =
            (globs("--include", &self.include)?, globs("--exclude", &self.exclude)?);
        let bar = progress_bar(0, "keys listed");
        bar.unset_length();
        let whole = format!("s3://{}/{}", prefix.bucket, prefix.key);
        let store = app.s3_images().await?;
        let mut failed = None;
        let listing = store.each_page(prefix, |page| {
            bar.inc(page.len() as u64);
            for uri in page {
                let below = uri.strip_prefix(&whole).unwrap_or(&uri).trim_start_matches('/');
                let wanted = match self.include.is_empty() {
                    // What is named in full is taken as it is.
                    true => has_image_ending(&uri) || uri == whole,
                    false => include.is_match(below),
                };
                if wanted && !exclude.is_match(below) {
                    let pushed = spool.push(angler_wire::job::ImageRef { uri, id: None });
                    failed = failed.take().or(pushed.err());
                }
            }
            failed.is_none()
        });
        listing.await?;
        bar.finish_and_clear();
        match failed {
            Some(error) => Err(error).context("the list of images cannot be kept"),
            None => Ok(spool.finish()?),
        }
    }

    fn no_globs(&self) -> Result<(), UsageError> {
        match self.include.is_empty() && self.exclude.is_empty() {
            true => Ok(()),
            false => Err(UsageError("--include and --exclude go with an S3 prefix".to_owned())),
        }
    }
}

/// What a worker can fetch.
fn fetchable(uri: &str) -> Result<(), Reason> {
    S3Uri::object(uri).map(drop).map_err(Reason::of)
}

fn globs(flag: &str, patterns: &[String]) -> Result<GlobSet, UsageError> {
    let wrong = |e: globset::Error| UsageError(format!("{flag}: {e}"));
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        set.add(Glob::new(pattern).map_err(wrong)?);
    }
    set.build().map_err(wrong)
}
