//! Class sets: what is active in each loads and fits the model; what the settings name is there.

use std::collections::BTreeMap;
use std::time::Duration;

use angler_core::class_sets::load;
use angler_core::class_sets::publish::read_active;
use angler_core::store::{Listed, ObjectStore};
use angler_inference::model::Model;
use angler_vectors::ClassesError;
use angler_vectors::file::Expected;
use angler_wire::job::{ClassSelector, check_name};
use angler_wire::text::chain;

use super::report::Check;
use super::{Silent, within, within_time};
use crate::app::App;

/// What reading one version may take.
const LOADING: Duration = Duration::from_secs(60);

/// Looks at versions as a worker would, one at a time, so that only one is in memory.
struct Looker<'a> {
    root: &'a dyn ObjectStore,
    expected: Option<Expected>,
    max_bytes: u64,
}

/// What is active in each set, or that it cannot be used.
type Active = BTreeMap<String, Result<String, ()>>;

pub(super) async fn check(app: &App, model: Option<&Model>) -> Vec<Check> {
    let settings = &app.settings;
    let wrong = |message: String| {
        let remedy = "Correct classes.root: a folder, or s3://bucket/prefix; of a bucket's state \
                      the store's section says more.";
        vec![Check::problem("classes.root", message, remedy)]
    };
    let root = match app.class_root().await {
        Ok(root) => root,
        Err(error) => return wrong(chain(error.as_ref())),
    };
    let sets = match within(root.list("")).await {
        Ok(Ok(listed)) => sets(listed),
        Ok(Err(error)) => return wrong(chain(&error)),
        Err(silent) => return wrong(format!("{}: {silent}", root.place(""))),
    };
    let expected = model.map(|m| Expected { model: m.fingerprint.clone(), dim: m.dim });
    let max_bytes = settings.classes.version_bytes;
    let looker = Looker { root: root.as_ref(), expected, max_bytes };
    let mut checks = Vec::new();
    let mut active = Active::new();
    for set in sets {
        let Some((check, found)) = looker.set(&set).await else { continue };
        checks.push(check);
        active.insert(set, found);
    }
    if active.is_empty() {
        checks.push(Check::warning(
            "classes.root",
            format!("there is no class set under {}", root.place("")),
            "Correct classes.root, or make a set from a folder with one folder of images a class:\n  \
             angler classes build reference/ --set bottles --version 1",
        ));
    }
    // Both were read when the settings were checked.
    for selector in settings.preload().into_iter().flatten() {
        checks.push(looker.preload(&selector, &active).await);
    }
    if let Ok(Some(selector)) = settings.shadow() {
        checks.push(looker.shadow(&selector, &active).await);
    }
    checks
}

fn sets(listed: Vec<Listed>) -> Vec<String> {
    let folder = |entry: Listed| match entry {
        Listed::Folder { name } if check_name(&name).is_ok() => Some(name),
        _ => None,
    };
    listed.into_iter().filter_map(folder).collect()
}

impl Looker<'_> {
    /// What is active in a set; none if the folder is no set.
    async fn set(&self, set: &str) -> Option<(Check, Result<String, ()>)> {
        let broken = |check| Some((check, Err(())));
        let active = match within(read_active(self.root, set)).await {
            Ok(Ok(active)) => active,
            Ok(Err(error)) => return broken(problem(set, set, &error)),
            Err(silent) => return broken(Check::problem(set, silent.to_string(), STORE)),
        };
        let active = match active {
            Some((Ok(active), _)) => active,
            Some((Err(error), _)) => {
                let message = format!("active.json is {}", chain(&error));
                let remedy =
                    format!("Activate a version anew:\n  angler classes activate {set}@VERSION");
                return broken(Check::problem(set, message, remedy));
            }
            None => return self.without_active(set).await,
        };
        let version = active.version;
        match self.load(set, &version, active.sha256.as_deref()).await {
            Ok(found) => {
                Some((Check::ok(set, format!("{version} is active: {found}")), Ok(version)))
            }
            Err(failed) => broken(failed.check(set, &format!("{set}@{version}"))),
        }
    }

    async fn without_active(&self, set: &str) -> Option<(Check, Result<String, ()>)> {
        let listed = within(self.root.list(set)).await.ok()?.ok()?;
        let versions = listed.iter().filter(|entry| entry.name().ends_with(".safetensors")).count();
        if versions == 0 {
            return None;
        }
        let message = format!("no version is active, of {versions}: a job must name one");
        let remedy = format!("Activate one:\n  angler classes activate {set}@VERSION");
        Some((Check::warning(set, message, remedy), Err(())))
    }

    /// A worker is not ready before these are loaded.
    async fn preload(&self, selector: &ClassSelector, active: &Active) -> Check {
        let name = format!("classes.preload {selector}");
        let failed = match self.named(selector, active).await {
            Ok(message) => return Check::ok(name, message),
            Err(failed) => failed,
        };
        let check = failed.check(&name, &selector.to_string());
        Check::problem(
            name,
            format!("{}; a worker does not start", check.message),
            check.remedy.unwrap_or_default(),
        )
    }

    /// A worker goes on without it.
    async fn shadow(&self, selector: &ClassSelector, active: &Active) -> Check {
        let name = format!("classes.shadow {selector}");
        match self.named(selector, active).await {
            Ok(message) => Check::ok(name, message),
            Err(failed) => {
                let check = failed.check(&name, &selector.to_string());
                let message = format!("{}; a worker tries it again and again", check.message);
                Check::warning(name, message, check.remedy.unwrap_or_default())
            }
        }
    }

    async fn named(&self, selector: &ClassSelector, active: &Active) -> Result<String, Failed> {
        let ClassSelector { set, version } = selector;
        let serving = active.get(set);
        match (version, serving) {
            (None, Some(Ok(version))) => Ok(format!("{version} is active")),
            (Some(version), Some(Ok(serving))) if serving == version => Ok("is active".to_owned()),
            (Some(version), _) => self.load(set, version, None).await,
            (None, Some(Err(()))) => Err(Failed::Told),
            (None, None) => Err(Failed::Missing(self.root.place(set))),
        }
    }

    async fn load(&self, set: &str, version: &str, sha256: Option<&str>) -> Result<String, Failed> {
        let expected = self.expected.as_ref();
        let loading = load::load(self.root, (set, version), expected, sha256, self.max_bytes);
        let loaded = within_time(LOADING, loading).await.map_err(Failed::Silent)??;
        let classes = &loaded.classes;
        let compared = match expected {
            Some(_) => "",
            None => " (not compared with a model, which does not load)",
        };
        let (labels, vectors) = (classes.labels().iter().len(), classes.vectors().rows());
        Ok(format!("{labels} classes, {vectors} vectors{compared}"))
    }
}

const STORE: &str = "Look at what the store's section says.";

/// Why a version is no good.
enum Failed {
    Silent(Silent),
    Classes(ClassesError),
    Missing(String),
    /// The set has a line of its own.
    Told,
}

impl From<ClassesError> for Failed {
    fn from(error: ClassesError) -> Self {
        Self::Classes(error)
    }
}

impl Failed {
    fn check(&self, name: &str, version: &str) -> Check {
        match self {
            Self::Silent(silent) => Check::problem(name, format!("{version}: {silent}"), STORE),
            Self::Classes(error) => problem(name, version, error),
            Self::Missing(place) => Check::problem(
                name,
                format!("there is no class set at {place}"),
                "Correct the name, or classes.root; angler classes list shows what there is.",
            ),
            Self::Told => Check::problem(
                name,
                "has no active version that can be used",
                "See the set's own line.",
            ),
        }
    }
}

fn problem(name: &str, version: &str, error: &ClassesError) -> Check {
    let set = version.split('@').next().unwrap_or(version);
    let remedy = match error {
        ClassesError::ModelMismatch { .. } => format!(
            "Set model.path to the model that made it, or make it anew with this one:\n  \
             angler classes build reference/ --set {set} --version NEW\n  \
             angler classes activate {set}@NEW"
        ),
        ClassesError::UnknownSet { .. } | ClassesError::UnknownVersion { .. } => {
            format!("Name one that is there, or put it there:\n  angler classes list {set}")
        }
        ClassesError::Invalid { .. } => format!(
            "Make it anew under another version and activate that, or go back:\n  \
             angler classes rollback {set}"
        ),
        ClassesError::Unavailable(_) => STORE.to_owned(),
    };
    Check::problem(name, chain(error), remedy)
}
