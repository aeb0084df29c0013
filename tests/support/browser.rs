//! A real browser that opens a page without a network and says what a reader sees of it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use serde::Deserialize;

use super::var;

/// Sees a page from inside. With `window.lookAfter` before it, so many milliseconds after the page's load.
pub const PROBE: &str = include_str!("probe.js");
/// How long the browser may take; it needs half a second.
const DEADLINE: Duration = Duration::from_secs(60);

/// What the page looked like; `probe.js` says how each is found.
#[derive(Debug, Deserialize)]
pub struct Seen {
    /// The width that the page had, in CSS pixels.
    pub width: u32,
    /// The width that it took: more than `width` means that all of it scrolls sideways.
    pub scroll_width: u32,
    pub dark: bool,
    /// Script elements.
    pub scripts: usize,
    /// Elements with an attribute like `onerror`.
    pub handlers: usize,
    /// The width of each image in its own pixels; 0 if it could not be decoded.
    pub images: Vec<u32>,
    /// What each chart says of itself to who cannot see it.
    pub pictures: Vec<String>,
    /// The text of each table, by rows and cells.
    pub tables: Vec<Vec<Vec<String>>>,
    /// What the pointer reads: the `title` attributes.
    pub hints: Vec<String>,
    pub text: String,
    /// Elements whose text has a contrast below 4.5, which WCAG AA demands.
    pub faint: Vec<String>,
    /// What the page asked to load besides itself.
    pub resources: Vec<String>,
    /// What failed to run or to load.
    pub errors: Vec<String>,
    /// What the browser wrote to its console: also what the content security policy forbade.
    #[serde(skip)]
    pub console: Vec<String>,
}

impl Seen {
    /// All that is wrong with the page, whatever it shows.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.scroll_width > self.width {
            faults.push(format!("{} pixels wide on {}", self.scroll_width, self.width));
        }
        if self.scripts + self.handlers > 0 {
            faults.push(format!("{} scripts, {} handlers", self.scripts, self.handlers));
        }
        let broken = self.images.iter().filter(|width| **width == 0).count();
        if broken > 0 {
            faults.push(format!("{broken} images are not decoded"));
        }
        for (what, list) in [
            ("faint", &self.faint),
            ("asked for", &self.resources),
            ("error", &self.errors),
            ("console", &self.console),
        ] {
            faults.extend(list.iter().map(|text| format!("{what}: {text}")));
        }
        faults
    }
}

/// Opens a page from a file, in a frame of this width: a browser's own window may have a least width.
pub async fn look(html: &str, width: u32, dark: bool) -> Seen {
    let folder = tempfile::tempdir().unwrap();
    assert!(html.contains("<head>") && !PROBE.contains("</script"), "no place for the probe");
    let page = html.replacen("<head>", &format!("<head><script>{PROBE}</script>"), 1);
    std::fs::write(folder.path().join("page.html"), page).unwrap();
    let frame = folder.path().join("frame.html");
    let iframe = format!("<iframe src=page.html width={width} height=900 frameborder=0></iframe>");
    std::fs::write(&frame, format!("<!doctype html><body>{iframe}")).unwrap();

    // The page tells the frame what is seen.
    let arguments = ["--allow-file-access-from-files", "--dump-dom"].map(str::to_owned);
    seen(run(&arguments, &format!("file://{}", frame.display()), dark).await)
}

/// Opens a document that holds the page with the probe in a frame, of a server on this machine.
///
/// * `milliseconds`: of the page's own clock, which goes as fast as nothing has to be waited for.
pub async fn visit(url: &str, dark: bool, milliseconds: u32) -> Seen {
    let arguments = [format!("--virtual-time-budget={milliseconds}"), "--dump-dom".to_owned()];
    seen(run(&arguments, url, dark).await)
}

/// A picture of the page in a window of this size, as a PNG file.
pub async fn shoot(url: &str, (width, height): (u32, u32), dark: bool, path: &Path) {
    let arguments = [
        format!("--window-size={width},{height}"),
        "--hide-scrollbars".to_owned(),
        format!("--screenshot={}", path.display()),
    ];
    let (_, log) = run(&arguments, url, dark).await;
    assert!(path.is_file(), "no picture\n{log}");
}

/// Runs the browser to its end; yields what it printed and its log.
async fn run(arguments: &[String], url: &str, dark: bool) -> (String, String) {
    let profile = tempfile::tempdir().unwrap();
    let output = tokio::process::Command::new(var("ANGLER_TEST_BROWSER"))
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        .args(["--no-first-run", "--disable-background-networking", "--enable-logging=stderr"])
        .arg("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1") // no network
        .arg(format!("--blink-settings=preferredColorScheme={}", if dark { 0 } else { 1 }))
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(arguments)
        .arg(url)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(DEADLINE, output).await;
    let output = output.expect("the browser does not end").expect("ANGLER_TEST_BROWSER");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (text(output.stdout), text(output.stderr))
}

fn seen((dom, log): (String, String)) -> Seen {
    let seen = dom
        .split_once("data-seen=\"")
        .and_then(|(_, rest)| rest.split_once('"'))
        .unwrap_or_else(|| panic!("the page was not seen\n{dom}\n{log}"));
    let json = base64::engine::general_purpose::STANDARD.decode(seen.0).unwrap();
    let mut seen: Seen = serde_json::from_slice(&json).unwrap();
    seen.console = log.lines().filter(|l| l.contains(":CONSOLE")).map(str::to_owned).collect();
    seen
}
