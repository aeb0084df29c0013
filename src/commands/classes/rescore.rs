//! `angler classes rescore`: kept embeddings against a version, without images and without a model.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use angler_core::sink::jsonl::Line;
use angler_vectors::ClassVectors;
use angler_vectors::score::Scorer;
use angler_wire::job::{ImageEntry, Provenance, Verdict};
use angler_wire::text::plural;

use crate::app::App;
use crate::commands::classes::saved_embeddings::{Expected, Kept, KeptFile, matrix};
use crate::commands::classify::report::Report;
use crate::commands::label_args::LabelArgs;
use crate::commands::{UsageError, class_set};
use crate::shutdown;

/// Classify kept embeddings anew: no images, no model, no GPU
///
/// Writes what `angler classify` would have written with these vectors. A `.npy` file does not say
/// which model made it: it is taken to be that of the vectors, and `backend` is "unknown".
#[derive(Args)]
pub struct RescoreCommand {
    /// JSON lines of `angler classify --embeddings --out FILE`, results of jobs with
    /// "embeddings": true, or .npy, [rows, dim]
    #[arg(long, value_name = "FILE")]
    embeddings: PathBuf,
    /// With .npy: the URI of each row, one a line, as `angler collect --embeddings-out` writes them
    /// [default: the number of the row, from 0]
    #[arg(long, value_name = "FILE")]
    ids: Option<PathBuf>,
    /// SET[@VERSION] under classes.root, or a class vectors file
    #[arg(long, value_name = "SET[@VERSION]|FILE")]
    classes: String,
    #[command(flatten)]
    labels: LabelArgs,
}

impl RescoreCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        self.check()?;
        let classes = class_set::open(app, &self.classes).await?;
        let expected = Expected {
            classes: classes.id(),
            model: classes.model().to_owned(),
            dim: classes.dim(),
        };
        let scorer = app.settings.scorer();
        let mut kept = KeptFile::open(&self.embeddings, self.ids.as_deref(), expected)?;
        let stop = shutdown::on_signals("stopping").context("signals cannot be caught")?;
        let output = self.labels.open()?;
        let table = output.is_table();
        let (mut writer, finish) = output.split()?;
        let mut report = Report::new(&classes);
        let started = Instant::now();
        tokio::task::block_in_place(|| -> Result<()> {
            loop {
                // A file that is not complete is of no use, and it can be made again.
                if stop.is_cancelled() {
                    bail!("interrupted: the results are not complete");
                }
                let batch = kept.next_batch()?;
                if batch.is_empty() {
                    break;
                }
                for (entry, provenance) in self.score(&classes, &scorer, batch)? {
                    if let Some(writer) = &mut writer {
                        let line = Line { entry: &entry, provenance: &provenance };
                        line.write(writer).context("results cannot be written")?;
                    }
                    report.add(&entry);
                }
            }
            writer.as_mut().map_or(Ok(()), |w| w.flush()).context("results cannot be written")
        })?;
        if report.total() == 0 {
            bail!("{} holds no embedding", self.embeddings.display());
        }
        drop(writer);
        finish.complete()?;
        if table {
            print!("{}", report.table());
        }
        let seconds = started.elapsed().as_secs_f64();
        let rate = report.total() as f64 / seconds.max(1e-9);
        eprintln!("{} in {seconds:.1} s: {rate:.0} images/s", plural(report.total(), "image"));
        let labels = plural(classes.labels().len(), "label");
        eprintln!("  classes  {}, {labels}\n  model    {}", classes.id(), classes.model());
        eprint!("{}", report.counts());
        kept.remarks();
        self.labels.say_where();
        Ok(())
    }

    fn check(&self) -> Result<(), UsageError> {
        if self.ids.is_some() && self.embeddings.extension().is_none_or(|e| e != "npy") {
            return Err(UsageError(
                "--ids goes with a .npy file: lines name themselves".to_owned(),
            ));
        }
        self.labels.check()
    }

    fn score(
        &self,
        classes: &ClassVectors,
        scorer: &Scorer,
        batch: Vec<Kept>,
    ) -> Result<Vec<(ImageEntry, Provenance)>> {
        let embeddings = matrix(&batch, classes.dim())?;
        let LabelArgs { top_k, min_score, .. } = self.labels;
        // The margin needs the runner-up.
        let scores = classes.score_with(scorer, embeddings.view(), top_k.max(2));
        let mut scores = scores.into_iter();
        let mut entries = Vec::with_capacity(batch.len());
        for Kept { uri, id, backend, embedding } in batch {
            let verdict = match embedding {
                Err(error) => Verdict::Failed { error },
                Ok(_) => {
                    let top = scores.next().unwrap_or_default();
                    Verdict::Labelled(classes.classified(&top, top_k, min_score))
                }
            };
            let provenance = Provenance {
                classes: classes.id(),
                model: classes.model().to_owned(),
                backend: backend.unwrap_or_else(|| "unknown".to_owned()),
            };
            entries.push((ImageEntry { uri, id, verdict }, provenance));
        }
        Ok(entries)
    }
}
