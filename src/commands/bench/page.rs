//! The report as a page with charts.

use angler_inference::embed::Backend;
use angler_report::{Align, Bar, Cell, Html, Page, Shape, bars, note, paragraph, percent, table};

use super::layout::{bytes, rate};
use super::report::{EmbedRow, Path, Report};
use super::text::{COLUMNS, DECODE, EMBED, FETCH, PARTS, SCORE, WAYS, WHOLE};
use crate::commands::bench::baselines::Way;

impl Report {
    /// The whole file.
    pub(super) fn page(&self) -> String {
        let head = self.head();
        let subtitle = head.first().cloned().unwrap_or_default();
        let mut page = Page::new("Where the time goes", &subtitle);
        self.facts(&mut page);
        let parts = if self.has_parts() { paragraph(PARTS) } else { Html::default() };
        let what: Html = head.iter().skip(1).map(|line| paragraph(line)).collect();
        page.section("What this was", what.and(parts));
        if !self.whole.is_empty() {
            page.section("The whole and its ceiling", self.whole_section());
        }
        if !self.ways.is_empty() {
            page.section("Three ways", self.ways_section());
        }
        if !self.embed.is_empty() {
            page.section("Embed", self.embed_section());
        }
        if !self.decode.is_empty() {
            let headers = ["images", "size", "images/s", "ms", "core-ms", "decoding"];
            page.section("Decode", paragraph(DECODE).and(figures(&headers, self.decode_rows())));
        }
        if !self.fetch.is_empty() {
            page.section(
                "Fetch",
                paragraph(FETCH).and(rows(["from", "images"], self.fetch_rows())),
            );
        }
        if !self.score.is_empty() {
            let notes = self.score_notes().iter().map(|line| note(line)).collect();
            let html = paragraph(SCORE).and(rows(["classes", "as"], self.score_rows()));
            page.section("Score", html.and(notes));
        }
        if !self.publish.is_empty() {
            let what = format!("Results of {} images, confirmed.", self.settings.images_per_job);
            page.section(
                "Publish",
                paragraph(&what).and(rows(["to", "results/s"], self.publish_rows())),
            );
        }
        page.section("Images", self.images_section());
        page.finish()
    }

    fn facts(&self, page: &mut Page) {
        let mut facts = Vec::new();
        let names: Vec<String> =
            self.whole.iter().map(|r| format!("{}, {}", r.kind, r.path.name())).collect();
        for (row, name) in self.whole.iter().zip(&names) {
            let of = row.ratio.zip(row.ceiling.as_ref()).map(|(ratio, ceiling)| {
                let ceiling = rate(ceiling.images_per_second);
                format!("images/s, {} of the ceiling {ceiling}", percent(ratio))
            });
            facts.push((name.as_str(), rate(row.figure.images_per_second), of));
        }
        if let Some(backend) = self.model.backend {
            facts.push(("back end", backend.to_string(), None));
        }
        let cores = self.machine.cores.to_string();
        facts.push((
            "cores",
            cores,
            self.machine
                .busy_cores_before
                .map(|busy| format!("{busy:.2} of them busy before the start")),
        ));
        page.facts(&facts);
    }

    fn whole_section(&self) -> Html {
        let names = || self.whole.iter().map(|r| format!("{}, {}", r.path.name(), r.kind));
        let ceiling = |r: &super::report::WholeRow| {
            r.ceiling.as_ref().map_or(f64::NAN, |ceiling| ceiling.images_per_second)
        };
        let rates: Vec<Bar> = names()
            .zip(&self.whole)
            .map(|(name, row)| Bar {
                name,
                values: vec![row.figure.images_per_second, ceiling(row)],
            })
            .collect();
        let parts: Vec<&str> = self
            .whole
            .iter()
            .map(|r| &r.parts)
            .max_by_key(|parts| parts.len())
            .into_iter()
            .flatten()
            .map(|step| step.part)
            .collect();
        let needs: Vec<Bar> = names()
            .zip(&self.whole)
            .map(|(name, row)| {
                let need = |part: &&str| {
                    let step = row.parts.iter().find(|step| step.part == *part);
                    step.and_then(|step| step.figure.core_ms_per_image).unwrap_or(0.0)
                };
                Bar { name, values: parts.iter().map(need).collect() }
            })
            .collect();
        let headers = ["way", "images", "measured/s", "ceiling/s", "ratio", "core-ms"];
        let how = self.whole.iter().filter_map(|row| row.arithmetic(self.machine.cores));
        paragraph(WHOLE)
            .and(bars(
                "Measured rate and ceiling",
                "images/s",
                &["measured", "ceiling"],
                &rates,
                Shape::Beside,
            ))
            .and(bars("Core time of an image, by part", "core-ms", &parts, &needs, Shape::Stacked))
            .and(figures(&headers, self.whole_rows()))
            .and(how.map(|line| note(&line)).collect())
    }

    fn ways_section(&self) -> Html {
        let ways: Vec<Way> = [Way::OneByOne, Way::Batched, Way::Fused]
            .into_iter()
            .filter(|way| self.ways.iter().any(|row| row.way == *way))
            .collect();
        let mut inputs: Vec<&str> = self.ways.iter().map(|row| row.from.as_str()).collect();
        inputs.dedup();
        let seconds: Vec<Bar> = inputs
            .into_iter()
            .map(|from| {
                let value = |way: &Way| {
                    let row = self.ways.iter().find(|row| row.way == *way && row.from == from);
                    row.map_or(f64::NAN, |row| row.seconds_per_100_images)
                };
                Bar { name: format!("from {from}"), values: ways.iter().map(value).collect() }
            })
            .collect();
        let names: Vec<&str> = ways.iter().map(|way| way.name()).collect();
        let headers = ["way", "from", "s per 100 images", "speed"];
        paragraph(WAYS)
            .and(bars("Time for 100 images", "s", &names, &seconds, Shape::Beside))
            .and(figures(&headers, self.way_rows()))
            .and(self.way_notes().iter().map(|line| paragraph(line)).collect())
    }

    fn embed_section(&self) -> Html {
        let mut backends: Vec<Backend> = self.embed.iter().map(|row| row.backend).collect();
        backends.dedup();
        let mut batches: Vec<usize> = self.embed.iter().map(|row| row.batch).collect();
        batches.sort_unstable();
        batches.dedup();
        let value = |backend: &Backend, batch| {
            let fits = |row: &&EmbedRow| row.backend == *backend && row.batch == batch;
            self.embed.iter().find(fits).map_or(f64::NAN, |row| row.figure.images_per_second)
        };
        let rates: Vec<Bar> = batches
            .into_iter()
            .map(|batch| Bar {
                name: format!("batch {batch}"),
                values: backends.iter().map(|backend| value(backend, batch)).collect(),
            })
            .collect();
        let names: Vec<&str> = backends.iter().map(|backend| backend.as_str()).collect();
        let skipped = self
            .embed_skipped
            .iter()
            .map(|skipped| note(&format!("Not {}: {}.", skipped.backend, skipped.reason)));
        paragraph(EMBED)
            .and(bars("Rate by the size of a batch", "images/s", &names, &rates, Shape::Beside))
            .and(rows(["back end", "batch"], self.embed_rows()))
            .and(skipped.collect())
    }

    fn images_section(&self) -> Html {
        let cells = self.images.iter().map(|images| {
            let size = bytes(images.mean_bytes);
            vec![images.kind.clone(), images.format.clone(), size, images.count.to_string()]
        });
        let through = match self.whole.iter().any(|row| row.path == Path::Broker) {
            true => "from files and from the store",
            false => "from files",
        };
        figures(&["images", "format", "mean size", "different ones"], cells.collect()).and(note(
            &format!("They are read {through} that were read before: no disk is measured."),
        ))
    }
}

fn rows(names: [&str; 2], rows: Vec<Vec<String>>) -> Html {
    let headers: Vec<&str> = names.into_iter().chain(COLUMNS).collect();
    figures(&headers, rows)
}

/// Two columns of names, which become one, so that a phone has room for it; then figures.
fn figures(headers: &[&str], rows: Vec<Vec<String>>) -> Html {
    let joined = |names: &[String]| names.join(", ").into();
    let rows: Vec<Vec<Cell>> = rows
        .into_iter()
        .map(|row| {
            let (names, figures) = row.split_at(row.len().min(2));
            [joined(names)].into_iter().chain(figures.iter().cloned().map(Cell::from)).collect()
        })
        .collect();
    let name = headers.get(..2).unwrap_or_default().join(", ");
    let headers: Vec<&str> =
        [name.as_str()].into_iter().chain(headers.iter().skip(2).copied()).collect();
    let alignments: Vec<Align> = (0..headers.len())
        .map(|column| if column == 0 { Align::Left } else { Align::Right })
        .collect();
    table(&headers, &rows, &alignments)
}
