//! A job over both.

use serde_json::json;

use crate::support::{
    Bucket, Setup, eventually, fashion_classes, files, s3_client_at, unique, var,
};
use crate::tls::pki::{Authority, text};
use crate::tls::servers::{PASSWORD, TlsBroker, TlsStore, system_trusts};

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_does_its_job_over_tls_on_both_sides_and_its_log_holds_no_secret() {
    let authority = Authority::new("our own");
    let server = authority.server(&["localhost"]);
    let (broker, store) = (TlsBroker::start(&authority, &server), TlsStore::start(&server));
    let (root, classes) = fashion_classes();
    let name = unique("b");
    let (key, secret) = (var("ANGLER_TEST_S3_KEY"), var("ANGLER_TEST_S3_SECRET"));
    let client = s3_client_at(&store.http(), &key, &secret);
    client.create_bucket().bucket(&name).send().await.unwrap();
    let bucket = Bucket { name, client };
    let uris = bucket.upload("q", &files("samples/fashion/query")[..2]).await;

    let identity = authority.client();
    let mut setup = Setup::store();
    setup.env.insert("ANGLER__AMQP__URL".into(), broker.url("localhost"));
    setup
        .set("amqp.ca_file", text(&authority.file))
        .set("amqp.client_cert_file", text(&identity.cert))
        .set("amqp.client_key_file", text(&identity.key))
        .set("s3.endpoint", &store.https("localhost"))
        .set("s3.ca_file", text(&authority.file))
        .set("classes.root", root.path().to_str().unwrap())
        .set("http.listen", "127.0.0.1:0")
        .set("log.level", "trace");
    // As in a slim container: the system trusts nobody, and the files have to do.
    system_trusts(&mut setup, None);
    let worker = setup.start().await;
    let client = broker.connect().await;
    let mut results = client.consume("angler.results").await;
    client.job(&json!({"id": "a", "images": uris, "classes": classes})).await;
    let result = results.next().await.body;
    assert_eq!(result["status"], "done", "{result}");
    for entry in result["images"].as_array().unwrap() {
        assert!(entry["label"].is_string(), "{entry}");
    }
    // The commands come by the same way.
    let (code, out, log) = setup.run(&["dead", "list"]);
    assert_eq!(code, 0, "{log}");
    assert!(out.contains("no dead letters"), "{out}");
    worker.signal("TERM");
    eventually("it ends", async || worker.log().contains("is settled").then_some(())).await;

    let pem = std::fs::read_to_string(&identity.key).unwrap();
    let key_text = pem.lines().nth(1).unwrap();
    let (_, help, _) = setup.run(&["worker", "--help"]);
    let everything = format!("{}{log}{help}", worker.log());
    assert!(everything.len() > 10_000, "the log says everything");
    for (what, secret) in [("password", PASSWORD), ("key", key_text), ("S3 secret", &secret)] {
        let line = everything.lines().find(|line| line.contains(secret));
        assert_eq!(line, None, "the {what} is in the log");
    }
}
