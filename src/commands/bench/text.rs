//! The report on a terminal of 80 columns, and the words that the page uses, too.

use angler_report::count;

use super::ceiling::Step;
use super::figures::Figure;
use super::layout::{bytes, ms, paragraph, rate, section, table};
use super::report::{Path, Report, WholeRow};
use crate::commands::bench::baselines::{PIXELS, Way};

/// What each section says of itself.
pub(super) const PARTS: &str = "Each part alone, as wide as the machine allows. ms: time on the clock for \
    each image; core-ms: what all cores together worked for it; own: what of that this process did. The \
    rest is a broker or a store on this machine, or other load.";
pub(super) const FETCH: &str =
    "Files or objects, as many at once as s3.concurrency says. Nothing is done with the bytes.";
pub(super) const DECODE: &str = "What the pipeline does with a file: decode, resize, crop. A large JPEG is \
    decoded at a fraction of its size. Decoding: its share of a thread's time, resizing is the rest.";
pub(super) const EMBED: &str = "The model, by back end and by images in a batch; the sessions and threads are those of the settings.";
pub(super) const SCORE: &str =
    "The cosine with every class and the best of them, a full batch at a time.";
pub(super) const WHOLE: &str = "The pipeline, beside its ceiling: the cores divided by the core-seconds \
    that the parts of an image's way need together, or the rate of the slowest part alone, whichever is \
    lower.";
pub(super) const WAYS: &str = "The same work without a pipeline, nothing at the same time: one image after \
    the other; in batches, with the cosine on the host; in batches, with the cosine in the model's graph.";

impl Way {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::OneByOne => "one by one",
            Self::Batched => "batched, cosine on the host",
            Self::Fused => "batched, cosine in the graph",
        }
    }
}

impl Path {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Folder => "folder",
            Self::Broker => "broker and store",
        }
    }
}

/// Images a second, ms, core-ms, own core-ms.
pub(super) fn cells(figure: &Figure) -> [String; 4] {
    [
        rate(figure.images_per_second),
        ms(Some(figure.ms_per_image)),
        ms(figure.core_ms_per_image),
        ms(figure.own_core_ms_per_image),
    ]
}

/// What [`cells`] are called.
pub(super) const COLUMNS: [&str; 4] = ["images/s", "ms", "core-ms", "own"];

impl Report {
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for line in self.head() {
            paragraph(&mut text, &line);
        }
        self.parts(&mut text);
        self.whole(&mut text);
        self.ways(&mut text);
        text
    }

    /// What was measured on, and what to be careful of.
    pub(super) fn head(&self) -> Vec<String> {
        let (model, machine, settings) = (&self.model, &self.machine, &self.settings);
        let mut lines = vec![format!(
            "Model {}, {} × {}, {} values{}.",
            model.fingerprint,
            model.width,
            model.height,
            count(model.dim as u64),
            model.backend.map(|backend| format!(", on {backend}")).unwrap_or_default()
        )];
        let cores = if machine.cores == 1 { "core" } else { "cores" };
        let of_rounds = match settings.rounds {
            1 => "one round".to_owned(),
            rounds => format!("medians of {rounds} rounds"),
        };
        lines.push(format!(
            "{} {cores}, {of_rounds}, {} s a part.",
            machine.cores, settings.seconds
        ));
        lines.extend(self.cautions());
        lines
    }

    fn cautions(&self) -> Vec<String> {
        let machine = &self.machine;
        let mut lines = Vec::new();
        if let (Some(busy), Some(false)) = (machine.busy_cores_before, machine.quiet) {
            lines.push(format!(
                "NOT QUIET: before the start other programs worked on {busy:.2} of {} cores. Their work \
                 counts in core-ms and slows everything: stop them and run it again.",
                machine.cores
            ));
        }
        if let Some(processors) = machine.processors.filter(|count| *count > machine.cores) {
            lines.push(format!(
                "The system counts {processors} processors, of which {} are for this process: core-ms is \
                 of all of them, whoever uses them.",
                machine.cores
            ));
        }
        if self.settings.seconds < 0.5 || self.settings.rounds < 3 {
            lines.push(
                "A short run: it shows what there is, its figures are worth little.".to_owned(),
            );
        }
        lines
    }

    fn parts(&self, text: &mut String) {
        if self.has_parts() {
            section(text, "The parts", PARTS);
        }
        let rows = self.fetch_rows();
        if !rows.is_empty() {
            section(text, "Fetch", FETCH);
            table(text, &["from", "images"], &COLUMNS, rows);
        }
        let rows = self.decode_rows();
        if !rows.is_empty() {
            section(text, "Decode", DECODE);
            table(text, &["images", "size"], &["images/s", "ms", "core-ms", "decoding"], rows);
        }
        let rows = self.embed_rows();
        if !rows.is_empty() {
            section(text, "Embed", EMBED);
            table(text, &["back end", "batch"], &COLUMNS, rows);
            for skipped in &self.embed_skipped {
                paragraph(text, &format!("Not {}: {}.", skipped.backend, skipped.reason));
            }
        }
        let rows = self.score_rows();
        if !rows.is_empty() {
            section(text, "Score", SCORE);
            table(text, &["classes", "as"], &COLUMNS, rows);
        }
        for line in self.score_notes() {
            paragraph(text, &line);
        }
        let rows = self.publish_rows();
        if !rows.is_empty() {
            let what = format!("Results of {} images, confirmed.", self.settings.images_per_job);
            section(text, "Publish", &what);
            table(text, &["to", "results/s"], &COLUMNS, rows);
        }
    }

    /// Whether any part was measured.
    pub(super) fn has_parts(&self) -> bool {
        let empty = self.fetch.is_empty() && self.decode.is_empty() && self.embed.is_empty();
        !(empty && self.score.is_empty() && self.publish.is_empty())
    }

    pub(super) fn fetch_rows(&self) -> Vec<Vec<String>> {
        let row = |r: &super::report::FetchRow| {
            row([r.from.name().into(), r.kind.clone()], cells(&r.figure))
        };
        self.fetch.iter().map(row).collect()
    }

    pub(super) fn decode_rows(&self) -> Vec<Vec<String>> {
        let size = |kind: &str| {
            let images = self.images.iter().find(|images| images.kind == kind);
            images.map(|i| format!("{}, {}", i.format, bytes(i.mean_bytes))).unwrap_or_default()
        };
        let row = |r: &super::report::DecodeRow| {
            let [rate, ms, core_ms, _] = cells(&r.figure);
            let share = format!("{:.0}%", 100.0 * r.decode_share);
            row([r.kind.clone(), size(&r.kind)], [rate, ms, core_ms, share])
        };
        self.decode.iter().map(row).collect()
    }

    pub(super) fn embed_rows(&self) -> Vec<Vec<String>> {
        let row = |r: &super::report::EmbedRow| {
            row([r.backend.to_string(), r.batch.to_string()], cells(&r.figure))
        };
        self.embed.iter().map(row).collect()
    }

    pub(super) fn score_rows(&self) -> Vec<Vec<String>> {
        let row = |r: &super::report::ScoreRow| {
            row([count(r.classes as u64), r.precision.to_string()], cells(&r.figure))
        };
        self.score.iter().map(row).collect()
    }

    pub(super) fn score_notes(&self) -> Vec<String> {
        let note = |s: &super::report::SkippedClasses| {
            let (classes, size) = (count(s.classes as u64), bytes(s.bytes));
            format!("Not {classes} classes: they take {size}, more than --memory allows.")
        };
        self.score_skipped.iter().map(note).collect()
    }

    pub(super) fn publish_rows(&self) -> Vec<Vec<String>> {
        let row = |r: &super::report::PublishRow| {
            row([r.to.name().into(), rate(r.results_per_second)], cells(&r.figure))
        };
        self.publish.iter().map(row).collect()
    }

    fn whole(&self, text: &mut String) {
        if self.whole.is_empty() {
            return;
        }
        section(text, "The whole", WHOLE);
        let headers = ["measured/s", "ceiling/s", "ratio", "core-ms"];
        table(text, &["way", "images"], &headers, self.whole_rows());
        for row in &self.whole {
            if let Some(line) = row.arithmetic(self.machine.cores) {
                paragraph(text, &line);
            }
        }
    }

    pub(super) fn whole_rows(&self) -> Vec<Vec<String>> {
        let row = |r: &WholeRow| {
            let figures = [
                rate(r.figure.images_per_second),
                r.ceiling.as_ref().map_or_else(dash, |c| rate(c.images_per_second)),
                r.ratio.map_or_else(dash, |ratio| format!("{:.0}%", 100.0 * ratio)),
                ms(r.figure.core_ms_per_image),
            ];
            row([r.path.name().into(), r.kind.clone()], figures)
        };
        self.whole.iter().map(row).collect()
    }

    fn ways(&self, text: &mut String) {
        if self.ways.is_empty() {
            return;
        }
        section(text, "Three ways", WAYS);
        let rows = self.way_rows();
        table(text, &["way", "from"], &["s per 100 images", "speed"], rows);
        for line in self.way_notes() {
            paragraph(text, &line);
        }
    }

    pub(super) fn way_rows(&self) -> Vec<Vec<String>> {
        let row = |r: &super::report::WayRow| {
            let from = match r.from.as_str() {
                PIXELS => "pixels in memory".to_owned(),
                kind => format!("{kind} files"),
            };
            let figures =
                [format!("{:.3}", r.seconds_per_100_images), format!("{:.2} ×", r.speedup)];
            row([r.way.name().into(), from], figures)
        };
        self.ways.iter().map(row).collect()
    }

    pub(super) fn way_notes(&self) -> Vec<String> {
        let batching = self.batching();
        let in_sessions = batching.as_ref().and_then(|_| self.batching_in_sessions());
        let mut lines: Vec<String> = batching.into_iter().chain(in_sessions).collect();
        if self.fused == Some(false) {
            lines.push("Cosine in the graph: not available with this back end.".to_owned());
        }
        lines
    }
}

fn dash() -> String {
    "–".to_owned()
}

fn row<const N: usize>(names: [String; 2], figures: [String; N]) -> Vec<String> {
    names.into_iter().chain(figures).collect()
}

impl WholeRow {
    /// How the ceiling comes about, in one sentence.
    pub(super) fn arithmetic(&self, cores: usize) -> Option<String> {
        let ceiling = self.ceiling.as_ref()?;
        let place = format!("{}, {}", self.path.name(), self.kind);
        if ceiling.limited_by != "cores" {
            return Some(format!(
                "{place}: {} is the slowest, {} images/s by itself.",
                ceiling.limited_by,
                rate(ceiling.by_slowest_part)
            ));
        }
        let needs = |step: &Step| format!("{} {}", step.part, ms(step.figure.core_ms_per_image));
        let needs: Vec<String> = self.parts.iter().map(needs).collect();
        let heaviest = ceiling
            .heaviest
            .as_ref()
            .map(|heaviest| format!(", {:.0}% of it {}", 100.0 * heaviest.share, heaviest.part));
        Some(format!(
            "{place}: {cores} cores / ({} core-ms) = {} images/s{}.",
            needs.join(" + "),
            rate(ceiling.images_per_second),
            heaviest.unwrap_or_default()
        ))
    }
}
