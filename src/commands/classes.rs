//! `angler classes`: make versions of class vectors, measure them, swap them, take them elsewhere.

mod activate;
mod build;
mod compare;
mod evaluate;
mod export;
mod formats;
mod import;
mod list;
mod npy;
mod rescore;
mod saved_embeddings;
mod shadow;
mod show;
mod thresholds;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use angler_core::class_sets::catalog::version_key;
use angler_core::store::ObjectError;
use angler_vectors::{Contents, file};
use angler_wire::job::check_name;

use super::UsageError;
use crate::app::App;

/// Make versions of class vectors, measure them, swap them, take them elsewhere
#[derive(Subcommand)]
pub enum ClassesCommand {
    // The commands' own types carry their help.
    Build(build::BuildCommand),
    Import(import::ImportCommand),
    List(list::ListCommand),
    Show(show::ShowCommand),
    Evaluate(evaluate::EvaluateCommand),
    Compare(compare::CompareCommand),
    Shadow(shadow::ShadowCommand),
    Activate(activate::ActivateCommand),
    Rollback(activate::RollbackCommand),
    Rescore(rescore::RescoreCommand),
    Export(export::ExportCommand),
}

impl ClassesCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        match self {
            Self::Build(command) => command.run(app).await,
            Self::Import(command) => command.run(app).await,
            Self::List(command) => command.run(app).await,
            Self::Show(command) => command.run(app).await,
            Self::Evaluate(command) => command.run(app).await,
            Self::Compare(command) => command.run(app).await,
            Self::Shadow(command) => command.run(app).await,
            Self::Activate(command) => command.run(app).await,
            Self::Rollback(command) => command.run(app).await,
            Self::Rescore(command) => command.run(app).await,
            Self::Export(command) => command.run(app).await,
        }
    }
}

/// The version that a command makes.
#[derive(Args)]
struct Target {
    /// Name of the class set
    #[arg(long, value_name = "NAME")]
    set: String,
    /// The new version; an existing one is never overwritten
    #[arg(long, value_name = "VERSION")]
    version: String,
    /// Print what was made as JSON
    #[arg(long)]
    json: bool,
}

impl Target {
    fn check(&self) -> Result<(), UsageError> {
        check_name(&self.set).map_err(|e| UsageError(format!("--set: {e}")))?;
        check_name(&self.version).map_err(|e| UsageError(format!("--version: {e}")))
    }

    /// `set@version`.
    fn id(&self) -> String {
        format!("{}@{}", self.set, self.version)
    }

    /// Refuses a version that exists, before work is put into it.
    async fn check_free(&self, app: &App) -> Result<()> {
        let root = app.class_root().await?;
        let key = version_key(&self.set, &self.version);
        if root.open(&key).await.context("classes.root cannot be read")?.is_some() {
            bail!(ObjectError::Exists(root.place(&key)));
        }
        Ok(())
    }

    /// Writes the version; yields its place.
    async fn write(&self, app: &App, contents: &Contents) -> Result<String> {
        let bytes = file::write(contents, (&self.set, &self.version))?;
        let root = app.class_root().await?;
        let key = version_key(&self.set, &self.version);
        match root.create(&key, bytes.into()).await {
            Ok(()) => Ok(root.place(&key)),
            Err(error @ ObjectError::Exists(_)) => bail!(error),
            Err(error) => Err(error).context("class vectors cannot be written"),
        }
    }

    /// Where the version is, and what comes next, for people.
    fn next_step(&self, place: &str) -> String {
        let id = self.id();
        format!(
            "written to {place}; jobs and `angler classify` name it {id}\n\
             next: `angler classes activate {id}` makes it the one that {} alone means",
            self.set
        )
    }
}

/// How many labels differ.
fn distinct(labels: &[String]) -> usize {
    labels.iter().collect::<std::collections::HashSet<_>>().len()
}
