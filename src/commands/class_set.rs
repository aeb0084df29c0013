//! Class vectors as a command line names them: `SET[@VERSION]` under `classes.root`, a file, or, for
//! `angler classify`, a folder of reference images.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};

use angler_core::class_sets::load;
use angler_core::class_sets::load::{Loaded, active_key};
use angler_core::class_sets::publish::read_active;
use angler_vectors::file::Expected;
use angler_vectors::score::ClassScore;
use angler_vectors::{ClassVectors, ClassesError, file};
use angler_wire::error::Reason;
use angler_wire::job::{ClassSelector, LabelScore, check_name};

use super::UsageError;
use crate::app::{App, is_s3, last_component};

/// What `--classes` turned out to be.
pub(super) enum ClassesOrigin {
    Folder(String),
    File(PathBuf),
    Set(ClassSelector),
}

impl ClassesOrigin {
    /// What the text names.
    ///
    /// # Errors
    /// If it is nothing that exists, and no name either.
    pub(super) fn parse(text: &str) -> Result<Self, UsageError> {
        let path = Path::new(text);
        if path.is_dir() || is_s3(text) {
            return Ok(Self::Folder(text.to_owned()));
        }
        if path.is_file() {
            return Ok(Self::File(path.to_owned()));
        }
        ClassSelector::parse(text)
            .map(Self::Set)
            .map_err(|e| UsageError(format!("--classes: no such folder or file, and {e}")))
    }
}

/// Opens `SET[@VERSION]` or a file, of whatever model.
///
/// A name wins over a folder that happens to be called so, and a file over a name.
///
/// # Errors
/// If there is no such version, or it cannot be used.
pub(super) async fn open(app: &App, text: &str) -> Result<Arc<ClassVectors>> {
    if Path::new(text).is_file() {
        return read_file(Path::new(text)).map(Arc::new);
    }
    let selector = ClassSelector::parse(text)
        .map_err(|e| UsageError(format!("{text}: no class vectors file, and {e}")))?;
    Ok(load_whole(app, &selector).await?.classes)
}

/// The version under `classes.root`, of whatever model, with what its file was; the active version
/// if the selector names none. [`angler_core::class_sets::catalog::Catalog`] loads only what fits the model
/// that runs, and here none does.
pub(super) async fn load_whole(app: &App, selector: &ClassSelector) -> Result<Loaded> {
    let root = app.class_root().await?;
    let set = &selector.set;
    let (version, sha256) = match &selector.version {
        Some(version) => (version.clone(), None),
        None => {
            let place = root.place(&active_key(set));
            let (active, _) = read_active(root.as_ref(), set).await?.ok_or_else(|| {
                let reason = format!("{place} does not exist; name a version: {set}@VERSION");
                ClassesError::UnknownSet { set: set.clone(), reason }
            })?;
            let active =
                active.map_err(|e| ClassesError::Invalid { place, reason: Reason::of(e) })?;
            (active.version, active.sha256)
        }
    };
    let limit = app.settings.classes.version_bytes;
    let name = (set.as_str(), version.as_str());
    Ok(load::load(root.as_ref(), name, None, sha256.as_deref(), limit).await?)
}

/// Checks that class vectors fit embeddings of this model.
///
/// # Errors
/// [`ClassesError::ModelMismatch`], or that the dimensions differ.
pub(super) fn check_model(classes: &ClassVectors, model: &str, dim: usize) -> Result<()> {
    let expected = Expected { model: model.to_owned(), dim };
    Ok(expected.check(&classes.id(), classes.model(), classes.dim())?)
}

/// The thresholds of a version by label: a class's own, else the set's.
pub(super) fn thresholds(classes: &ClassVectors) -> impl Fn(&str) -> Option<f32> + Sync + use<> {
    let (own, set) = (classes.min_scores(), classes.min_score());
    move |label| own.get(label).copied().or(set)
}

/// The distinct labels of a version, in order.
pub(super) fn labels(classes: &ClassVectors) -> Vec<String> {
    classes.labels().iter().map(str::to_owned).collect()
}

/// The label of this number.
pub(super) fn label(classes: &ClassVectors, class: u32) -> &str {
    classes.labels().get(class as usize)
}

/// Scores with the names of their classes.
pub(super) fn named(classes: &ClassVectors, top: &[ClassScore]) -> Vec<LabelScore> {
    let name = |best: &ClassScore| LabelScore {
        label: label(classes, best.class).to_owned(),
        score: best.score,
    };
    top.iter().map(name).collect()
}

/// `<set>/<version>.safetensors` names itself; any other path is named as well as it allows.
pub(super) fn read_file(path: &Path) -> Result<ClassVectors> {
    let parent = path.parent().map(|p| last_component(&p.to_string_lossy())).unwrap_or_default();
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let place = path.display().to_string();
    let mut file = std::fs::File::open(path).with_context(|| place.clone())?;
    let bytes = file.metadata().with_context(|| place.clone())?.len();
    let mut reader = file::Reader::new(&place, bytes, None);
    let mut chunk = vec![0; 1 << 20];
    loop {
        match file.read(&mut chunk).with_context(|| place.clone())? {
            0 => break,
            read => reader.push(&chunk[..read])?,
        }
    }
    Ok(file::check(reader.finish()?, (&name_of(&parent), &name_of(&stem)), &place)?)
}

pub(super) fn folder_name(folder: &str) -> String {
    let absolute = Path::new(folder).canonicalize().map(|p| p.to_string_lossy().into_owned());
    name_of(&last_component(&absolute.unwrap_or_else(|_| folder.to_owned())))
}

/// The text as a valid name: other characters become `-`.
fn name_of(text: &str) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let name: String = text.chars().map(|c| if allowed(c) { c } else { '-' }).take(64).collect();
    if check_name(&name).is_ok() { name } else { "classes".to_owned() }
}
