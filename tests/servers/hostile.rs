//! Images and messages that mean harm, against a real worker: each is its own error, its neighbours
//! are classified, and memory stays under the bound that the README states.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Cursor, Write};
use std::process::{Command, Stdio};

use crate::support::{Broker, Bucket, Setup, Worker, eventually, tiny};
use image::codecs::gif::{GifEncoder, Repeat};
use image::codecs::jpeg::JpegEncoder;
use image::{Frame, RgbImage, RgbaImage};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, LongString};
use serde_json::{Value, json};

use angler_core::class_sets::load::version_key;

struct World {
    broker: Broker,
    bucket: Bucket,
    setup: Setup,
    /// Three that are well.
    good: Vec<String>,
    _root: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let (broker, bucket) = (Broker::new().await, Bucket::new().await);
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(version_key("colours", "1"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, tiny::version("colours", "1")).unwrap();
        let mut setup = Setup::worker(&broker, root.path().to_str().unwrap());
        setup.set("model.path", tiny::MODEL).set("embedder.backend", "tract");
        setup.set("classes.preload", "colours@1");
        setup.set("limits.image_pixels", &PIXELS.to_string());
        setup.set("limits.bytes_in_flight", &IN_FLIGHT.to_string());
        setup.set("limits.image_bytes", &IMAGE_BYTES.to_string());
        let good = tiny::images(&bucket).await;
        Self { broker, bucket, setup, good, _root: root }
    }
}

/// The most memory that a process has had, in bytes.
fn peak(worker: &Worker) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() * 1024
}

/// The limits of these tests.
const PIXELS: u64 = 25_000_000;
const IN_FLIGHT: u64 = 64_000_000;
const IMAGE_BYTES: u64 = 8_000_000;

/// What a worker may need beyond what it has when it is idle, by the README. (The pixels of 256
/// images for this model are too few to count.)
fn bound() -> u64 {
    let cores = std::thread::available_parallelism().unwrap().get() as u64;
    IN_FLIGHT + cores * (PIXELS * 16 + IMAGE_BYTES + (16 << 20))
}

/// Labels and error codes of a job's images.
fn verdicts(result: &Value) -> Vec<String> {
    let images = result["images"].as_array().unwrap_or_else(|| panic!("{result}"));
    let verdict = |image: &Value| match image["label"].as_str() {
        Some(label) => label.to_owned(),
        None => image["error"]["code"].as_str().unwrap().to_owned(),
    };
    images.iter().map(verdict).collect()
}

/// A chunk of a PNG, with its checksum.
fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(kind);
    crc.update(data);
    [&(data.len() as u32).to_be_bytes()[..], kind, data, &crc.sum().to_be_bytes()].concat()
}

/// A PNG of this size, 8-bit RGB, with these chunks before its pixels.
fn png(width: u32, height: u32, before: &[Vec<u8>], pixels: &[u8]) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    file.extend(chunk(b"IHDR", &header));
    file.extend(before.concat());
    file.extend(chunk(b"IDAT", pixels));
    file.extend(chunk(b"IEND", &[]));
    file
}

/// So many zeros, deflated: a thousandth of them.
fn zeros(bytes: u64) -> Vec<u8> {
    endless(&[], bytes)
}

/// Something, and then zeros.
fn endless(first: &[u8], bytes: u64) -> Vec<u8> {
    let mut deflate = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    deflate.write_all(first).unwrap();
    let megabyte = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        deflate.write_all(&megabyte).unwrap();
    }
    deflate.write_all(&megabyte[..(bytes & 0xf_ffff) as usize]).unwrap();
    deflate.finish().unwrap()
}

/// 8 × 8 green pixels.
fn green() -> Vec<u8> {
    endless(&green_rows(8), 0)
}

/// A square of green pixels, as a PNG stores them before it deflates them.
fn green_rows(side: usize) -> Vec<u8> {
    [&[0][..], &[9, 200, 9].repeat(side)].concat().repeat(side)
}

/// A JPEG that says that it has 5000 × 5000 pixels: the most that decoding takes a pixel.
fn grown(path: &str) -> Vec<u8> {
    let mut file = std::fs::read(crate::support::repository(path)).unwrap();
    let frame = file.windows(2).position(|pair| matches!(pair, [0xff, 0xc0..=0xc2])).unwrap();
    for at in [frame + 5, frame + 7] {
        file[at..at + 2].copy_from_slice(&5_000_u16.to_be_bytes());
    }
    file
}

/// A TIFF whose directory's next one is itself, and whose strips lie nowhere.
fn tiff() -> Vec<u8> {
    let mut file = b"II*\0\x08\0\0\0".to_vec();
    let entries: [(u16, u16, u32, u32); 6] = [
        (256, 4, 1, 5_000),         // width
        (257, 4, 1, 5_000),         // height
        (258, 3, 1, 8),             // bits
        (262, 3, 1, 1),             // grey
        (273, 4, 4_000_000_000, 0), // strips
        (279, 4, 4_000_000_000, 0), // their lengths
    ];
    file.extend((entries.len() as u16).to_le_bytes());
    for (tag, kind, count, value) in entries {
        file.extend(tag.to_le_bytes());
        file.extend(kind.to_le_bytes());
        file.extend(count.to_le_bytes());
        file.extend(value.to_le_bytes());
    }
    file.extend(8_u32.to_le_bytes());
    file
}

/// A WebP whose canvas has 2^28 pixels.
fn webp() -> Vec<u8> {
    let mut canvas = b"VP8X\x0a\0\0\0\x10\0\0\0".to_vec();
    canvas.extend(&16_383_u32.to_le_bytes()[..3]);
    canvas.extend(&16_383_u32.to_le_bytes()[..3]);
    let mut file = b"RIFF".to_vec();
    file.extend((canvas.len() as u32 + 4).to_le_bytes());
    file.extend(b"WEBP");
    file.extend(canvas);
    file
}

/// Thousands of frames, of which the first counts.
fn endless_gif() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = GifEncoder::new_with_speed(&mut bytes, 30);
    encoder.set_repeat(Repeat::Infinite).unwrap();
    for number in 0..3_000_u32 {
        let colour =
            if number == 0 { [9, 200, 9, 255] } else { [200, (number % 50) as u8, 9, 255] };
        let frame = RgbaImage::from_pixel(8, 8, image::Rgba(colour));
        encoder.encode_frame(Frame::new(frame)).unwrap();
    }
    drop(encoder);
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bomb_is_its_own_error_and_its_neighbours_are_classified() {
    let world = World::new().await;
    let bombs: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("strip.png", png(1, 60_000_000, &[], &zeros(4 * 60_000_000)), &["too_large"]),
        ("wide.png", png(65_500, 65_500, &[], &zeros(1 << 20)), &["too_large"]),
        // Under the limit on pixels, and its data would go on for ever.
        (
            "small.png",
            png(100, 100, &[], &endless(&green_rows(100), 1 << 30)),
            &["red", "green", "blue", "corrupt_image"],
        ),
        // Metadata that inflates.
        (
            "text.png",
            png(
                8,
                8,
                &[chunk(b"zTXt", &[b"a\0\0".as_slice(), &zeros(1 << 30)].concat())],
                &green(),
            ),
            &["red", "green", "blue", "corrupt_image", "too_large"],
        ),
        (
            "profile.png",
            png(
                8,
                8,
                &[chunk(b"iCCP", &[b"a\0\0".as_slice(), &zeros(1 << 30)].concat())],
                &green(),
            ),
            &["red", "green", "blue", "corrupt_image", "too_large"],
        ),
        ("loop.tiff", tiff(), &["corrupt_image", "too_large", "unsupported_format"]),
        ("canvas.webp", webp(), &["corrupt_image", "too_large"]),
        ("endless.gif", endless_gif(), &["green"]),
        (
            "grown.jpg",
            grown("tests/data/images/progressive.jpg"),
            &["corrupt_image", "red", "green", "blue"],
        ),
        (
            "grown-ycck.jpg",
            grown("tests/data/images/ycck.jpg"),
            &["corrupt_image", "red", "green", "blue"],
        ),
        ("bytes.bin", vec![0; 9_000_000], &["too_large"]),
    ];
    let mut jobs = BTreeMap::new();
    let client = world.broker.connect().await;
    let worker = world.setup.start().await;
    let idle = peak(&worker);
    let mut results = client.consume("angler.results").await;
    for (name, bytes, allowed) in &bombs {
        let bomb = world.bucket.put(name, bytes.clone()).await;
        let [red, green, blue] = &world.good[..] else { panic!() };
        let images = json!([red, bomb, green, bomb, blue]);
        client.job(&json!({"id": name, "images": images, "classes": "colours@1"})).await;
        jobs.insert(*name, *allowed);
    }
    for (name, result) in results.collect(bombs.len()).await {
        let verdicts = verdicts(&result.body);
        let [red, bomb, green, again, blue] = &verdicts[..] else { panic!("{verdicts:?}") };
        assert_eq!([red, green, blue], ["red", "green", "blue"], "{name}: {verdicts:?}");
        assert_eq!(bomb, again, "{name}");
        assert!(jobs[name.as_str()].contains(&bomb.as_str()), "{name}: {bomb}");
        println!("{name}: {bomb}");
    }
    let (taken, bound) = (peak(&worker) - idle, bound());
    println!("peak {} MB over idle, the bound is {} MB", taken / 1_000_000, bound / 1_000_000);
    assert!(taken < bound, "{taken} of {bound} bytes");
    worker.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_200_photos_of_24_megapixels_stays_under_the_bound() {
    let mut world = World::new().await;
    world.setup.set("limits.image_seconds", "120");
    // Green, with some life in it.
    let photo = RgbImage::from_fn(6_000, 4_000, |x, y| {
        image::Rgb([9, 180 + ((x / 7 + y / 5) % 40) as u8, 9 + ((x * y / 9000) % 9) as u8])
    });
    let mut bytes = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut bytes, 85).encode_image(&photo).unwrap();
    drop(photo);
    let photo = world.bucket.put("photo.jpg", bytes.into_inner()).await;
    let client = world.broker.connect().await;
    let worker = world.setup.start().await;
    let idle = peak(&worker);
    let mut results = client.consume("angler.results").await;
    // All at once, and small ones among them.
    for number in 0..10 {
        let mut images = vec![photo.as_str(); 20];
        images.push(&world.good[2]);
        let job =
            json!({"id": format!("flood/{number}"), "images": images, "classes": "colours@1"});
        client.job(&job).await;
    }
    for result in results.collect(10).await.values() {
        let verdicts = verdicts(&result.body);
        assert!(verdicts[..20].iter().all(|verdict| verdict == "green"), "{verdicts:?}");
        assert_eq!(verdicts[20], "blue");
    }
    let (taken, bound) = (peak(&worker) - idle, bound());
    println!("peak {} MB over idle, the bound is {} MB", taken / 1_000_000, bound / 1_000_000);
    assert!(taken < bound, "{taken} of {bound} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_mean_harm_are_malformed_and_the_worker_goes_on() {
    let world = World::new().await;
    let worker = world.setup.start().await;
    let idle = peak(&worker);
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let job =
        |images: Value, classes: &str| json!({"images": images, "classes": classes}).to_string();
    let good = || json!([world.good[0]]);
    let huge = format!(r#"{{"images":["{}"],"classes":"colours"}}"#, "x".repeat(100_000_000));
    let deep =
        format!(r#"{{"images":{}{},"classes":"s"}}"#, "[".repeat(100_000), "]".repeat(100_000));
    let mut cases: Vec<(String, Vec<u8>)> = vec![
        ("not UTF-8".into(), b"{\"images\":[\"\xff\xfe\"],\"classes\":\"s\"}".to_vec()),
        ("100 MB".into(), huge.into_bytes()),
        ("deep".into(), deep.into_bytes()),
    ];
    let long = "v".repeat(65);
    for name in [
        "../colours",
        "a/b",
        "colours@../1",
        "colours@1/../1",
        "colours@",
        "@1",
        "",
        "a\0b",
        "colours@\u{2024}\u{2024}",
        &long,
    ] {
        cases.push((format!("name {name:?}"), job(good(), name).into_bytes()));
    }
    let count = cases.len();
    for (id, body) in cases {
        let properties = BasicProperties::default().with_message_id(id.as_str().into());
        client.publish("angler.jobs", &body, properties).await;
    }
    for (id, result) in results.collect(count).await {
        assert_eq!(result.body["status"], "failed", "{id}: {}", result.body);
        assert_eq!(result.body["error"]["code"], "malformed_job", "{id}: {}", result.body);
    }
    // A copy or two of the largest, and not for long.
    let taken = peak(&worker) - idle;
    assert!(taken < 350_000_000, "{taken} bytes for a message of 100 MB");

    // Where images may come from.
    let elsewhere = json!([
        "file:///etc/passwd",
        "/etc/passwd",
        "http://127.0.0.1/a.png",
        "https://a/b.png",
        "s3:///k",
        "s3://",
        "../../etc/passwd",
        world.good[1],
    ]);
    client.job(&json!({"id": "uris", "images": elsewhere, "classes": "colours@1"})).await;
    let verdicts = verdicts(&results.next().await.body);
    assert!(verdicts[..7].iter().all(|verdict| verdict == "bad_uri"), "{verdicts:?}");
    assert_eq!(verdicts[7], "green");
    worker.ready().await;
}

/// A message whose complaint would quote all of it, and headers that fill a frame already: the copy
/// among the dead letters must still fit into the broker's frames.
#[tokio::test(flavor = "multi_thread")]
async fn long_complaints_and_long_headers_settle_and_the_worker_goes_on() {
    let world = World::new().await;
    let mut worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let quoted = json!({"images": "x".repeat(300_000), "classes": "colours"}).to_string();
    for (id, header) in [("plain", None), ("note", Some("x-note")), ("trace", Some("traceparent"))]
    {
        let mut properties = BasicProperties::default().with_message_id(id.into());
        if let Some(header) = header {
            let mut headers = FieldTable::default();
            let long = LongString::from("n".repeat(130_000));
            headers.insert(header.into(), AMQPValue::LongString(long));
            headers.insert("x-tenant".into(), AMQPValue::LongString("kept".into()));
            properties = properties.with_headers(headers);
        }
        client.publish("angler.jobs", quoted.as_bytes(), properties).await;
    }
    let results = results.collect(3).await;
    for result in results.values() {
        let message = result.body["error"]["message"].as_str().unwrap();
        assert!(message.starts_with("the message is not a job"), "{message}");
        assert!(message.chars().count() <= 1001, "{} characters", message.chars().count());
    }
    for _ in 0..3 {
        let letter = eventually("a dead letter", async || client.get("angler.dead").await).await;
        assert_eq!(letter.header("angler-reason").as_deref(), Some("malformed_job"));
        assert!(letter.header("angler-error").unwrap().ends_with('…'));
        assert_eq!(letter.raw, quoted.as_bytes());
        if letter.properties.message_id().as_ref().unwrap().as_str() != "plain" {
            assert_eq!(letter.header("x-tenant").as_deref(), Some("kept"));
        }
    }
    worker.signal("TERM");
    assert!(worker.ended().await.success(), "{}", worker.log());
    assert!(!worker.log().contains("x".repeat(2000).as_str()), "the log quotes all of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_cannot_be_written_ends_no_worker() {
    let mut world = World::new().await;
    let client = world.broker.connect().await;
    let mut results = None;
    for format in ["text", "json"] {
        world.setup.set("log.format", format);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut child =
            world.setup.command(&["worker"]).stdout(Stdio::null()).stderr(full).spawn().unwrap();
        eventually("the worker's queue", async || world.broker.depth("angler.results")).await;
        if results.is_none() {
            results = Some(client.consume("angler.results").await);
        }
        let malformed = BasicProperties::default().with_message_id("malformed".into());
        client.publish("angler.jobs", b"{", malformed).await;
        client.job(&json!({"id": "good", "images": [world.good[1]], "classes": "colours@1"})).await;
        let all = results.as_mut().unwrap().collect(2).await;
        assert_eq!(verdicts(&all["good"].body), ["green"], "{format}");
        let told = Command::new("kill").arg("-TERM").arg(child.id().to_string()).status().unwrap();
        assert!(told.success());
        let ended = eventually("the worker ends", async || child.try_wait().unwrap()).await;
        assert!(ended.success(), "{format}: {ended}");
    }
}
