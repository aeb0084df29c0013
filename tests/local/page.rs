//! Pages as a reader gets them: opened by a real browser from a file, without a network.

use std::path::Path;

use crate::support::browser::{Seen, look};
use crate::support::files;

use angler_pixels::{PixelLimits, decode};
use angler_report::{
    Align, Card, Cell, Page, Series, THUMBNAIL_SIDE, Tone, confusion, gallery, histogram, note,
    paragraph, table, thumbnail, write,
};

/// A name that wants to be markup, to run, to end what it stands in, to be decoded twice, and to turn
/// what follows. The image comes first: an end tag would swallow it.
const HOSTILE: &str = "<img src=\"http://x.invalid/a.png\" onerror=\"document.title='owned'\">\
                       </script></style> &lt;b&gt; \u{202e}gpj";

fn picture(path: &Path) -> Result<Vec<u8>, String> {
    let bytes = std::fs::read(path).unwrap();
    let image = decode(&bytes, PixelLimits { max_pixels: 1 << 24 }).map_err(|e| e.to_string())?;
    let (width, height) = image.dimensions();
    thumbnail(&image, width, height, THUMBNAIL_SIDE).map_err(|e| e.to_string())
}

fn card(path: &Path, number: usize) -> Card {
    let tone = [Tone::Bad, Tone::Good, Tone::Neutral][number % 3];
    let label = if tone == Tone::Good { "bag" } else { "ankle-boot" };
    Card {
        thumbnail: picture(path),
        uri: format!("s3://photos/2026-01-31/{}", path.file_name().unwrap().to_string_lossy()),
        lines: vec![
            ("true".into(), "bag".into()),
            ("label".into(), label.into()),
            ("score".into(), format!("0.{}", 913 - number * 37)),
        ],
        tone,
    }
}

fn cards() -> Vec<Card> {
    let mut paths = files("samples/photos");
    paths.extend(files("samples/fashion/query").into_iter().step_by(30));
    let mut cards: Vec<Card> = paths.iter().enumerate().map(|(n, path)| card(path, n)).collect();
    cards.insert(
        2,
        Card {
            thumbnail: Err(format!("corrupt_image: {HOSTILE}")),
            uri: format!("s3://photos/{}/{HOSTILE}", "unbroken".repeat(150)),
            lines: vec![(HOSTILE.into(), HOSTILE.into()), ("x".repeat(300), "y".repeat(300))],
            tone: Tone::Bad,
        },
    );
    cards
}

/// Row, column, images.
type Counts = Vec<(usize, usize, u64)>;

/// Classes, one of them hostile, and what their images were taken for: mostly right, each a little for
/// the next two, a few unknown.
fn counts(classes: usize) -> (Vec<String>, Vec<String>, Counts) {
    let names = ["ankle-boot", "bag", "coat", "dress", "pullover", "sandal", "shirt", "sneaker"];
    let mut rows: Vec<String> = (0..classes)
        .map(|n| match names.get(n) {
            Some(name) => (*name).to_owned(),
            None => format!("a-class-with-a-rather-long-name-{n}"),
        })
        .collect();
    rows[classes / 2] = HOSTILE.to_owned();
    let mut columns = rows.clone();
    columns.push("unknown".into());
    let mut counts = Vec::new();
    for row in 0..classes {
        let wrong = (row * row % 13) as u64;
        counts.push((row, row, 120 - wrong * 8));
        counts.push((row, (row + 1) % classes, wrong * 6));
        counts.push((row, (row + 2) % classes, wrong * 2));
        counts.push((row, classes, (row % 3) as u64));
    }
    (rows, columns, counts)
}

/// Every component, with what is hard on each.
fn everything() -> String {
    let mut page = Page::new("Evaluation", "bottles@7 · efficientnet-lite0@3f2a9c1b04de · photos/");
    page.facts(&[
        ("right", "93.4%".into(), Some("1,121 of 1,200 images".into())),
        ("unknown", "14".into(), Some("below the threshold 0.35".into())),
        ("not readable", "1".into(), None),
        ("the weakest class", HOSTILE.into(), Some(HOSTILE.into())),
    ]);
    let (rows, columns, few) = counts(9);
    page.section("What was taken for what", confusion(&rows, &columns, &few));
    let bell = |centre: f64, height: f64| {
        let value = |bin: i32| (-((f64::from(bin) - centre) / 4.0).powi(2)).exp() * height;
        (0..40).map(|bin| value(bin) as u64).collect()
    };
    let series = [
        Series { name: "right".into(), bins: bell(30.0, 160.0) },
        Series { name: "wrong".into(), bins: bell(21.0, 9.0) },
        Series { name: HOSTILE.into(), bins: bell(24.0, 50.0) },
    ];
    let threshold = Some((0.35, "threshold"));
    let scores =
        histogram("Scores of the best class", "cosine", &series[..2], (-0.2, 1.0), threshold);
    let hostile = histogram(HOSTILE, HOSTILE, &series, (0.0, 1.0), Some((0.97, HOSTILE)));
    page.section("Scores", paragraph("Right and wrong labels, by score.").and(scores).and(hostile));
    let cells: Vec<Vec<Cell>> = rows
        .iter()
        .enumerate()
        .map(|(n, row)| {
            let share = 1.0 - n as f64 / 11.0;
            vec![row.as_str().into(), Cell::count(1_200), Cell::share(share), "0.712".into()]
        })
        .collect();
    let right = Align::Right;
    page.section(
        "Classes",
        table(
            &["class", "images", "right", "mean score"],
            &cells,
            &[Align::Left, right, right, right],
        ),
    );
    page.section("Images to look at", gallery(&cards()).and(note("The worst come first.")));
    let (rows, columns, many) = counts(120);
    page.section(HOSTILE, confusion(&rows, &columns, &many));
    page.finish()
}

/// As the page shows it: without what turns the direction.
fn shown() -> String {
    HOSTILE.replace('\u{202e}', "\u{fffd}")
}

fn check(seen: &Seen) {
    assert_eq!(seen.faults(), [""; 0]);
    // Every readable image, at the size of a thumbnail; the small ones are not enlarged.
    let expected = cards().iter().filter(|card| card.thumbnail.is_ok()).count();
    assert_eq!(seen.images.len(), expected);
    assert!(seen.images.contains(&160) && seen.images.contains(&28), "{:?}", seen.images);

    // The tables: nine classes, the list, 120 classes cut to 40.
    let [few, list, many] = &seen.tables[..] else { panic!("{} tables", seen.tables.len()) };
    let (rows, _, counts) = counts(9);
    for (row, label) in rows.iter().enumerate() {
        let cells = &few[row + 1];
        let label = label.replace('\u{202e}', "\u{fffd}");
        assert!(seen.hints.contains(&label), "{label}: {:?}", seen.hints); // in full
        let start: String = label.chars().take(12).collect();
        assert!(cells[0].starts_with(&start) && cells[0].chars().count() <= 25, "{cells:?}");
        let total: u64 = counts.iter().filter(|(r, _, _)| *r == row).map(|(_, _, n)| n).sum();
        assert_eq!(cells[11], total.to_string(), "{cells:?}");
        for (_, column, images) in counts.iter().filter(|(r, _, n)| *r == row && *n > 0) {
            assert_eq!(cells[column + 1], images.to_string(), "{cells:?}");
        }
        assert_eq!(list[row + 1][0], label);
    }
    assert_eq!(few[0][10], "unknown");
    assert!(seen.hints.contains(&"bag → bag: 112 of 121 (92.6%)".to_owned()), "{:?}", seen.hints);
    assert_eq!(many.len(), 41);
    assert_eq!(many[0][42..], ["other classes", "images", "right"]);
    assert!(seen.text.contains("Shown are the 40 of 120 classes"), "{}", seen.text);

    assert!(
        seen.pictures[0].starts_with("Scores of the best class. Histogram of cosine, −0.2 to 1.")
    );
    assert!(seen.pictures[1].starts_with(&shown()), "{:?}", seen.pictures);
    // In a heading as in the rest, the name is only a name.
    assert!(seen.text.contains(&shown()), "{}", seen.text);
}

#[tokio::test]
async fn a_page_is_sound_on_a_laptop_and_on_a_phone_in_light_and_dark() {
    let html = everything();
    // Kept, to be looked at by who changes its style.
    write(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("page.html"), &html).unwrap();
    for (width, dark) in [(1280, false), (1280, true), (360, false), (360, true)] {
        let seen = look(&html, width, dark).await;
        assert_eq!((seen.width, seen.dark), (width, dark), "the browser did not do as it was told");
        check(&seen);
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_page_is_seen() {
    let page = |head: &str, body: &str| {
        format!(
            "<!doctype html><html><head><meta charset=\"utf-8\">{head}</head>\
             <body><p>text</p>{body}</body></html>"
        )
    };
    let policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'\">";
    for (head, body, fault) in [
        ("", "<div style=\"width: 2000px\">wide</div>", "pixels wide on 360"),
        ("", "<p style=\"color: #888\">grey</p>", "faint: 3.54"),
        ("", "<p><svg><text y=\"9\" fill=\"#eee\">grey</text></svg></p>", "faint: 1.1"),
        ("", "<script>1</script><p onclick=\"1\">x</p>", "1 scripts, 1 handlers"),
        ("", "<script>throw 'ow'</script>", "error: Uncaught ow"),
        ("", "<img src=\"data:image/jpeg;base64,AAAA\">", "1 images are not decoded"),
        ("", "<img src=\"http://x.invalid/a.png\">", "asked for: http://x.invalid/a.png"),
        (
            policy,
            "<img src=\"http://x.invalid/a.png\">",
            "violates the following Content Security Policy",
        ),
        (policy, "<p onclick=\"1\">x</p>", "0 scripts, 1 handlers"),
        (policy, "<script>1</script>", "inline script violates"),
        ("<script>console.log('hm')</script>", "", "\"hm\""),
    ] {
        let faults = look(&page(head, body), 360, false).await.faults();
        assert!(faults.iter().any(|f| f.contains(fault)), "{body}: {faults:?}");
    }
    assert_eq!(look(&page("", ""), 360, false).await.faults(), [""; 0]);
}
