//! Pages that show what a command found: one HTML file each, for people who look before they read.
//!
//! A page needs nothing beside it: its style and its pictures are inside, there is no script, and its
//! content security policy forbids the browser to load or run anything else. So it can be mailed,
//! kept with a build, opened from a disk without a network, printed; it fits a phone and follows the
//! reader's choice of light or dark.
//!
//! Labels and URIs come from folders and buckets that anybody may have named. Markup is written with
//! `maud`, which escapes text; components return [`Html`], which nothing outside this crate can make
//! from a string, and a section takes only that. Components are bounded: what is too much to look at
//! is cut, and the page says so.
//!
//! ```
//! use angler_report::{Align, Cell, Page, table};
//!
//! let mut page = Page::new("Evaluation", "bottles@7");
//! page.facts(&[("right", "97.3%".into(), Some("of 1,200 images".into()))]);
//! let rows = [vec![Cell::from("cola"), Cell::share(0.95)]];
//! page.section("Classes", table(&["class", "right"], &rows, &[Align::Left, Align::Right]));
//! assert!(page.finish().starts_with("<!DOCTYPE html>"));
//! ```

mod bars;
mod confusion;
mod gallery;
mod histogram;
mod spreads;
mod svg;
mod table;
mod thumbnail;

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use maud::{DOCTYPE, Markup, PreEscaped, Render, html};

use angler_wire::error::Reason;

pub use bars::{Bar, Shape, bars};
pub use confusion::confusion;
pub use gallery::{Card, Tone, gallery};
pub use histogram::{Series, histogram};
pub use spreads::{Spread, spreads};
pub use table::{Align, Cell, table};
pub use thumbnail::{THUMBNAIL_SIDE, thumbnail};

const STYLE: &str = concat!(include_str!("base.css"), include_str!("page.css"));

/// Nothing is loaded and nothing is run, but for what the page carries: the fence behind the escaping.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
                      form-action 'none'; base-uri 'none'";

/// The most characters of a fact that are set large; the name of a class is often longer.
const SHORT: usize = 14;

/// What a page or a picture for it failed on.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// The file cannot be written.
    #[error("{}: cannot write the page", path.display())]
    Write {
        /// Where it was to go.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Pixels that are no picture, or that the resizer or the encoder refused.
    #[error("cannot make a thumbnail: {0}")]
    Thumbnail(#[source] Reason),
}

/// Markup that is safe on a page: made by this crate's components, all text in it escaped.
#[derive(Debug, Clone)]
pub struct Html(Markup);

impl Html {
    /// This, and `next` below it.
    #[must_use]
    pub fn and(self, next: Self) -> Self {
        Self(html! { (self) (next) })
    }
}

impl Default for Html {
    /// Nothing.
    fn default() -> Self {
        Self(html! {})
    }
}

impl Render for Html {
    fn render_to(&self, buffer: &mut String) {
        self.0.render_to(buffer);
    }
}

impl fmt::Display for Html {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.0)
    }
}

impl FromIterator<Html> for Html {
    fn from_iter<I: IntoIterator<Item = Html>>(all: I) -> Self {
        Self(html! { @for one in all { (one) } })
    }
}

/// Replaces characters that cannot be seen or that turn the direction of what follows (controls,
/// bidirectional embeddings and overrides) by U+FFFD: a name must not look like another, nor
/// rearrange the words around it.
fn visible(text: &str) -> String {
    let replaced = |c: char| match c {
        '\n' | '\t' => c,
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        c if c.is_control() => '\u{fffd}',
        c => c,
    };
    text.chars().map(replaced).collect()
}

/// A paragraph of plain text.
pub fn paragraph(text: &str) -> Html {
    Html(html! { p { (text) } })
}

/// Small print: how to read what stands above, or what was left out.
pub fn note(text: &str) -> Html {
    Html(html! { p.note { (text) } })
}

/// A part of a section: its own heading, with what belongs to it in small print, and what stands below.
pub fn group(heading: &str, aside: &str, body: Html) -> Html {
    Html(html! { div.group { h3 { (heading) " " small { (aside) } } (body) } })
}

/// A count as people read it: `1,234,567`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A share in [0, 1] as people read it: `97.3%`. Only what is all or nothing reads `100%` or `0%`, so
/// that one error in 10,000 is not rounded away. Not a number reads `–`.
pub fn percent(share: f64) -> String {
    if !share.is_finite() {
        "–".to_owned()
    } else if share == 0.0 || share == 1.0 {
        format!("{:.0}%", share * 100.0)
    } else if (0.0..0.0005).contains(&share) {
        "<0.1%".to_owned()
    } else if (0.9995..1.0).contains(&share) {
        ">99.9%".to_owned()
    } else {
        format!("{:.1}%", share * 100.0)
    }
}

/// A page that grows from top to bottom.
#[derive(Debug, Clone)]
pub struct Page {
    title: String,
    subtitle: String,
    body: Html,
    headings: Vec<String>,
    contents: bool,
}

impl Page {
    /// An empty page. `subtitle` says what was looked at: a class set and its version, a model, a date.
    pub fn new(title: &str, subtitle: &str) -> Self {
        Self {
            title: title.to_owned(),
            subtitle: subtitle.to_owned(),
            body: Html::default(),
            headings: Vec::new(),
            contents: false,
        }
    }

    /// Lists the sections below the title, as links to them: for a page that nobody scrolls to its end.
    pub fn with_contents(&mut self) -> &mut Self {
        self.contents = true;
        self
    }

    /// The numbers to see first, as tiles: name, value, and what it is a part of or compares with.
    pub fn facts(&mut self, facts: &[(&str, String, Option<String>)]) -> &mut Self {
        let facts = Html(html! {
            dl.facts {
                @for (name, value, note) in facts {
                    // A long one may be cut after some lines: its title is whole.
                    @let long = (value.chars().count() > SHORT).then_some(value);
                    div {
                        dt { (name) }
                        dd.value.long[long.is_some()] title=[long] { (value) }
                        @if let Some(note) = note { dd.note { (note) } }
                    }
                }
            }
        });
        self.add(facts)
    }

    /// A heading and what stands below it.
    pub fn section(&mut self, heading: &str, body: Html) -> &mut Self {
        self.headings.push(heading.to_owned());
        let id = self.headings.len();
        self.add(Html(html! { section id={ "s" (id) } { h2 { (heading) } (body) } }))
    }

    fn add(&mut self, html: Html) -> &mut Self {
        html.render_to(&mut self.body.0.0);
        self
    }

    fn contents(&self) -> Markup {
        html! {
            @if self.contents && !self.headings.is_empty() {
                nav aria-label="Sections" {
                    ul.contents {
                        @for (number, heading) in (1..).zip(&self.headings) {
                            li { a href={ "#s" (number) } { (heading) } }
                        }
                    }
                }
            }
        }
    }

    /// The whole file.
    pub fn finish(&self) -> String {
        let html = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta http-equiv="Content-Security-Policy" content=(POLICY);
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (self.title) }
                    style { (PreEscaped(STYLE)) }
                }
                body {
                    header {
                        h1 { (self.title) }
                        @if !self.subtitle.is_empty() { p.subtitle { (self.subtitle) } }
                        (self.contents())
                    }
                    main { (self.body) }
                    footer { "angler " (env!("CARGO_PKG_VERSION")) }
                }
            }
        };
        visible(&html.0)
    }
}

/// Writes a page: beside its place and then moved there, so that whoever looks finds the whole page,
/// or the whole one that was there before.
///
/// # Errors
/// What the system said; the old file is then as it was.
pub fn write(path: &Path, html: &str) -> Result<(), PageError> {
    let failed = |source| PageError::Write { path: path.to_owned(), source };
    let name = path.file_name().ok_or_else(|| failed(std::io::ErrorKind::IsADirectory.into()))?;
    // A name that no other writer has.
    let beside =
        format!(".{}.{}.{:016x}", name.to_string_lossy(), std::process::id(), fastrand::u64(..));
    let beside = path.with_file_name(beside);
    let written = std::fs::File::create_new(&beside)
        .and_then(|mut file| {
            file.write_all(html.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&beside, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&beside); // a leftover is only litter
    }
    written.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "</script><img src=x onerror=\"alert('1')\">&amp;";

    #[test]
    fn text_cannot_become_markup() {
        let shown = |text: &str| {
            let page = Page::new("t", text).finish();
            let (_, rest) = page.split_once("<p class=\"subtitle\">").unwrap();
            rest.split_once("</p></header>").unwrap().0.to_owned()
        };
        assert_eq!(
            shown(HOSTILE),
            "&lt;/script&gt;&lt;img src=x onerror=&quot;alert('1')&quot;&gt;&amp;amp;"
        );
        assert_eq!(shown("a\u{202e}gpj.exe\0\u{1b}[1m\n"), "a\u{fffd}gpj.exe\u{fffd}\u{fffd}[1m\n");
        assert_eq!(shown("žluťoučký 茶 עברית"), "žluťoučký 茶 עברית");
    }

    #[test]
    fn every_way_in_escapes() {
        let mut page = Page::new(HOSTILE, HOSTILE);
        page.facts(&[(HOSTILE, HOSTILE.into(), Some(HOSTILE.into()))]);
        page.section(HOSTILE, paragraph(HOSTILE).and(note(HOSTILE)));
        let cells = [vec![Cell::from(HOSTILE)]];
        page.section("t", table(&[HOSTILE], &cells, &[Align::Left]));
        let labels = [HOSTILE.to_owned(), "b".to_owned()];
        page.section("c", confusion(&labels, &labels, &[(0, 0, 1), (1, 0, 1)]));
        let series = [Series { name: HOSTILE.into(), bins: vec![1, 2] }];
        page.section("h", histogram(HOSTILE, HOSTILE, &series, (0.0, 1.0), Some((0.5, HOSTILE))));
        let rows = [Bar { name: HOSTILE.into(), values: vec![1.0] }];
        for shape in [Shape::Beside, Shape::Stacked] {
            page.section("b", bars(HOSTILE, HOSTILE, &[HOSTILE], &rows, shape));
        }
        let rows = [Spread { series: series[0].clone(), middle: Some(0.5) }];
        page.section("s", spreads(HOSTILE, HOSTILE, &rows, (0.0, 1.0)));
        page.section("i", group(HOSTILE, HOSTILE, note(HOSTILE)));
        page.with_contents();
        let card = |thumbnail| Card {
            thumbnail,
            uri: format!("{HOSTILE}/{HOSTILE}"),
            lines: vec![(HOSTILE.into(), HOSTILE.into())],
            tone: Tone::Bad,
        };
        page.section("g", gallery(&[card(Ok(vec![1])), card(Err(HOSTILE.into()))]));
        let html = page.finish();
        assert!(!html.contains("<img src=x"), "{html}");
        assert!(!html.contains("<script") && !html.contains("</script"), "{html}");
        assert!(!html.contains("onerror=\""), "{html}");
    }

    #[test]
    fn the_contents_lead_to_every_section() {
        let mut page = Page::new("t", "");
        page.section("First", note("x")).section("<Second>", note("y"));
        assert!(!page.finish().contains("<nav"));
        let html = page.with_contents().finish();
        for (link, place) in [
            ("<a href=\"#s1\">First</a>", "<section id=\"s1\"><h2>First</h2>"),
            ("<a href=\"#s2\">&lt;Second&gt;</a>", "<section id=\"s2\"><h2>&lt;Second&gt;</h2>"),
        ] {
            assert!(html.contains(link) && html.contains(place), "{html}");
        }
    }

    #[test]
    fn numbers_read_well_and_hide_no_error() {
        let counts: Vec<String> =
            [0, 999, 1_000, 12_345, 1_234_567].into_iter().map(count).collect();
        assert_eq!(counts, ["0", "999", "1,000", "12,345", "1,234,567"]);
        let shares = [0.0, 1.0, 0.9999, 0.00001, 0.123, f64::NAN].map(percent);
        assert_eq!(shares, ["0%", "100%", ">99.9%", "<0.1%", "12.3%", "–"]);
    }

    #[test]
    fn a_page_replaces_the_one_before_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("page.html");
        write(&path, "one").unwrap();
        write(&path, "two").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two");
        // A folder in the way: the move fails after the file was written.
        let taken = folder.path().join("taken");
        std::fs::create_dir(&taken).unwrap();
        let error = write(&taken, "three").unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: cannot write", taken.display())), "{error}");
        assert!(write(&folder.path().join("none/page.html"), "four").is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
