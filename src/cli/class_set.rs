//! Class vectors as a command line names them: `SET[@VERSION]` under `classes.root`, a file, or, for
//! `angler classify`, a folder of reference images.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::UsageError;
use crate::app::{App, is_s3, last_component};
use crate::classes::catalog::{active_key, version_key};
use crate::classes::{ClassVectors, ClassesError, file};
use crate::job::{ClassSelector, LabelScore, check_name, hex};
use crate::score::ClassScore;

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
pub(super) async fn open(app: &App, text: &str) -> Result<ClassVectors> {
    if Path::new(text).is_file() {
        return read_file(Path::new(text));
    }
    let selector = ClassSelector::parse(text)
        .map_err(|e| UsageError(format!("{text}: no class vectors file, and {e}")))?;
    load(app, &selector).await
}

/// The version under `classes.root`, of whatever model: [`crate::classes::catalog::Catalog`] loads
/// only what fits the model that runs, and here none does.
async fn load(app: &App, selector: &ClassSelector) -> Result<ClassVectors> {
    #[derive(Deserialize)]
    struct Active {
        version: String,
        sha256: Option<String>,
    }
    let root = app.class_root().await?;
    let set = &selector.set;
    let (version, sha256) = match &selector.version {
        Some(version) => (version.clone(), None),
        None => {
            let key = active_key(set);
            let place = root.place(&key);
            let bytes = root.get(&key).await?.ok_or_else(|| ClassesError::UnknownSet {
                set: set.clone(),
                reason: format!("{place} does not exist; name a version: {set}@VERSION"),
            })?;
            let active: Active = serde_json::from_slice(&bytes).context(place.clone())?;
            check_name(&active.version).map_err(anyhow::Error::msg).context(place)?;
            (active.version, active.sha256)
        }
    };
    let key = version_key(set, &version);
    let place = root.place(&key);
    let bytes = root.get(&key).await?.ok_or_else(|| ClassesError::UnknownVersion {
        set: set.clone(),
        version: version.clone(),
        reason: format!("{place} does not exist"),
    })?;
    tokio::task::block_in_place(|| {
        let found = || hex(&Sha256::digest(&bytes));
        if sha256.is_some_and(|wanted| !found().eq_ignore_ascii_case(&wanted)) {
            let reason = "its sha256 is not the one that active.json names".to_owned();
            return Err(ClassesError::Invalid { place, reason }.into());
        }
        Ok(file::read(&bytes, (set, &version), &place)?)
    })
}

/// Checks that class vectors fit embeddings of this model.
///
/// # Errors
/// [`ClassesError::ModelMismatch`], or that the dimensions differ.
pub(super) fn check_model(classes: &ClassVectors, model: &str, dim: usize) -> Result<()> {
    if classes.model() != model {
        return Err(ClassesError::ModelMismatch {
            place: classes.id(),
            made_with: classes.model().to_owned(),
            running: model.to_owned(),
        }
        .into());
    }
    if classes.dim() != dim {
        let reason = format!("its vectors have {} values, the model's {dim}", classes.dim());
        return Err(ClassesError::Invalid { place: classes.id(), reason }.into());
    }
    Ok(())
}

/// The threshold of a label: the set's.
pub(super) fn threshold(classes: &ClassVectors, _label: &str) -> Option<f32> {
    classes.min_score()
}

/// The label of this number.
pub(super) fn label(classes: &ClassVectors, class: u32) -> &str {
    &classes.labels()[class as usize]
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
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let parent = path.parent().map(|p| last_component(&p.to_string_lossy())).unwrap_or_default();
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let place = path.display().to_string();
    Ok(file::read(&bytes, (&name_of(&parent), &name_of(&stem)), &place)?)
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
