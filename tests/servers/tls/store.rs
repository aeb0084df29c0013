//! The same for the store: its certificate, and `s3.ca_file`.

use serde_json::json;

use crate::support::{
    Broker, Bucket, Setup, eventually, fashion_classes, files, s3_client_at, unique, var,
};
use crate::tls::pki::{Authority, text};
use crate::tls::servers::{TlsStore, system_trusts};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_stores_certificate_is_said_with_the_setting() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let store = TlsStore::start(&ours.server(&["localhost"]));
    let (key, secret) = (var("ANGLER_TEST_S3_KEY"), var("ANGLER_TEST_S3_SECRET"));
    let client = s3_client_at(&store.http(), &key, &secret);
    let name = unique("b");
    client.create_bucket().bucket(&name).send().await.unwrap();
    let bucket = Bucket { name, client };
    let uris = bucket.upload("q", &files("samples/fashion/query")[..1]).await;
    let prefix = format!("s3://{}/q/", bucket.name);
    let (root, classes) = fashion_classes();
    let folder = tempfile::tempdir().unwrap();
    let junk = folder.path().join("junk.pem");
    std::fs::write(&junk, "no certificate").unwrap();

    let mut setup = Setup::store();
    setup.set("classes.root", root.path().to_str().unwrap());
    setup.set("s3.endpoint", &store.https("localhost"));
    let classify = |setup: &Setup| setup.run(&["classify", &prefix, "--classes", classes]);
    // As it should be; the system's authorities are trusted beside the file's.
    for (system, file) in
        [(None, Some(&ours)), (Some(&ours), Some(&theirs)), (Some(&theirs), Some(&ours))]
    {
        let mut setup = setup.clone();
        system_trusts(&mut setup, system.map(|a| a.file.as_path()));
        setup.set("s3.ca_file", file.map(|a| text(&a.file)).unwrap_or_default());
        let (code, lines, log) = classify(&setup);
        assert_eq!(code, 0, "{log}");
        assert!(lines.contains("\"label\":\""), "{lines}");
    }
    let http_port = store.http().replace("http://127.0.0.1", "https://localhost");
    let elsewhere = store.https("127.0.0.1");
    for (ca_file, endpoint, said) in [
        ("", None, ["not trusted", "s3.ca_file"]),
        (text(&theirs.file), None, ["not trusted", "s3.ca_file"]),
        (text(&junk), None, ["s3.ca_file = ", "no certificate in it"]),
        ("/nowhere/ca.pem", None, ["s3.ca_file = ", "/nowhere/ca.pem"]),
        (text(&ours.file), Some(&elsewhere), ["s3.endpoint, 127.0.0.1", "localhost"]),
        (text(&ours.file), Some(&http_port), ["does not speak TLS", "s3.endpoint"]),
    ] {
        let mut setup = setup.clone();
        setup.set("s3.ca_file", ca_file);
        if let Some(endpoint) = endpoint {
            setup.set("s3.endpoint", endpoint);
        }
        let (code, _, log) = classify(&setup);
        assert_eq!(code, 1, "{log}");
        assert!(said.iter().all(|part| log.contains(part)), "{said:?}: {log}");
        assert!(!log.contains(&secret), "{log}");
    }

    // A worker's job is tried again, and then its result says it.
    let broker = Broker::new().await;
    let mut setup = Setup::worker(&broker, root.path().to_str().unwrap());
    setup
        .set("s3.endpoint", &store.https("localhost"))
        .set("s3.ca_file", text(&theirs.file))
        .set("retry.delays_seconds", "0.1")
        .set("retry.max_attempts", "2");
    let worker = setup.start().await;
    let client = broker.connect().await;
    let mut results = client.consume("angler.results").await;
    client.job(&json!({"id": "a", "images": uris, "classes": classes})).await;
    let result = results.next().await.body;
    assert_eq!((&result["status"], &result["attempt"]), (&json!("failed"), &json!(2)), "{result}");
    let message = result["error"]["message"].as_str().unwrap();
    assert!(message.contains("not trusted") && message.contains("s3.ca_file"), "{message}");
    worker.ready().await;
    eventually("it is kept", async || (broker.depth("angler.dead") == Some(1)).then_some(())).await;

    // One that has expired.
    let expired = TlsStore::start(&ours.expired_server("localhost"));
    let mut setup = Setup::store();
    setup.set("s3.endpoint", &expired.https("localhost")).set("s3.ca_file", text(&ours.file));
    let (code, _, log) =
        setup.run(&["classify", &prefix, "--classes", "samples/fashion/reference"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("the store's certificate expired at 2020-01-01"), "{log}");
}
