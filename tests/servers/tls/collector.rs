//! Traces over HTTPS: the store stands in for a collector, since it, too, is a server that speaks it.

use crate::support::{Broker, Bucket, Setup, eventually, tiny};
use crate::tls::pki::{Authority, text};
use crate::tls::servers::TlsStore;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_is_trusted_by_its_authority_and_what_is_wrong_is_said_once() {
    let authority = Authority::new("our own");
    let store = TlsStore::start(&authority.server(&["localhost"]));
    let (broker, bucket) = (Broker::new().await, Bucket::new().await);
    let mut setup = Setup::worker(&broker, &format!("s3://{}/classes", bucket.name));
    setup.set("model.path", tiny::MODEL);
    setup.set("telemetry.otlp_endpoint", &store.https("localhost"));
    setup.env.insert("OTEL_BSP_SCHEDULE_DELAY".into(), "50".into());
    let client = broker.connect().await;
    // It is reached, and takes no traces: it is no collector.
    for (ca_file, said) in [
        ("", "put that authority's certificate into telemetry.ca_file"),
        (text(&authority.file), "it answers 4"),
    ] {
        setup.set("telemetry.ca_file", ca_file);
        let worker = setup.start().await;
        client.job(&json!({"id": "a", "images": ["s3://b/k"], "classes": "none@1"})).await;
        eventually(said, async || worker.log().contains(said).then_some(())).await;
        assert_eq!(worker.log().matches("traces cannot be sent").count(), 1, "{}", worker.log());
    }
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.pem");
    setup.set("telemetry.ca_file", text(&missing));
    let (code, _, log) = setup.run(&["worker"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("telemetry.ca_file = ") && log.contains("missing.pem"), "{log}");
}
