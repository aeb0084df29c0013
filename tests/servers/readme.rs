//! What the README shows is true: its Python example runs, its settings and defaults exist.

use std::process::Command;

use crate::support::{Broker, Bucket, Setup, fashion_classes, files, repository, var};

fn readme() -> String {
    std::fs::read_to_string(repository("README.md")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_example_gets_its_result() {
    let readme = readme();
    let (_, rest) = readme.split_once("```python\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let (root, classes) = fashion_classes();
    let broker = Broker::new().await;
    let bucket = Bucket::new().await;
    let image = bucket.upload("q", &files("samples/fashion/query")[..1]).await.remove(0);
    let worker = Setup::worker(&broker, root.path().to_str().unwrap()).start().await;
    let output = Command::new(var("ANGLER_TEST_PYTHON"))
        .args(["-c", example])
        .env("AMQP_URL", &broker.url)
        .env("CLASSES", classes)
        .env("IMAGE", &image)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let result: serde_json::Value = serde_json::from_str(&text).expect(&text);
    assert_eq!(result["status"], "done");
    assert_eq!(result["images"][0]["uri"], image);
    drop(worker);
}

#[test]
fn every_setting_that_the_readme_names_exists_with_the_default_that_it_states() {
    let defaults: toml::Table = toml::from_str(angler::config::DEFAULTS).unwrap();
    let readme = readme();
    let mut named = 0;
    for word in readme.split(|c: char| c == '`' || c.is_whitespace()) {
        let Some((section, key)) = word.split_once('.') else { continue };
        let Some(table) = defaults.get(section).and_then(toml::Value::as_table) else { continue };
        let key = key.trim_end_matches(|c: char| !c.is_ascii_lowercase());
        if key.is_empty() || key == "toml" || key == "onnx" {
            continue;
        }
        let key = key.split('=').next().unwrap();
        assert!(table.contains_key(key), "the README names {word}, which is no setting");
        named += 1;
    }
    assert!(named > 15, "only {named} settings were found in the README");
    let limits = defaults["limits"].as_table().unwrap();
    for (key, shown, value) in [
        ("images_per_job", "1000", 1000),
        ("message_bytes", "4 MiB", 4 << 20),
        ("image_bytes", "32 MiB", 32 << 20),
        ("image_pixels", "50 million", 50_000_000),
        ("images_in_flight", "256", 256),
        ("bytes_in_flight", "256 MiB", 256 << 20),
        ("image_seconds", "60", 60),
        ("job_seconds", "900", 900),
    ] {
        assert_eq!(limits[key].as_integer(), Some(value), "{key}");
        assert!(readme.contains(&format!("`limits.{key}` | {shown} |")), "{key}");
    }
}
