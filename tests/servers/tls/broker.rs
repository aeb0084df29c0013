//! What is wrong with a broker's certificate, or with ours, is said and tried again.

use crate::support::proxy::Proxy;
use crate::support::{Setup, eventually, fashion_classes, http_get};
use crate::tls::pki::{Authority, text};
use crate::tls::servers::{PASSWORD, TlsBroker, system_trusts};

/// What is wrong, the settings that make it so, and what has to be said.
type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [&'a str]);

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_fails_names_what_is_wrong_and_the_setting_and_is_tried_again() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let broker = TlsBroker::start(&ours, &ours.server(&["localhost"]));
    let (good, foreign) = (ours.client(), theirs.client());
    let folder = tempfile::tempdir().unwrap();
    let junk = folder.path().join("junk.pem");
    let key_text = "-----BEGIN PRIVATE KEY-----MIIsecretsecretsecret";
    std::fs::write(&junk, key_text).unwrap();
    let missing = folder.path().join("missing.pem");
    let (root, _) = fashion_classes();
    let mut setup = Setup::store();
    setup
        .set("amqp.ca_file", text(&ours.file))
        .set("amqp.client_cert_file", text(&good.cert))
        .set("amqp.client_key_file", text(&good.key))
        .set("classes.root", root.path().to_str().unwrap())
        .set("http.listen", "127.0.0.1:0");
    setup.env.insert("ANGLER__AMQP__URL".into(), broker.url("localhost"));
    let elsewhere = broker.url("127.0.0.1");
    let plain = broker.url_without_tls();
    let cases: [Case<'_>; 10] = [
        ("no authority", &[("amqp.ca_file", "")], &["not trusted", "amqp.ca_file"]),
        (
            "a wrong authority",
            &[("amqp.ca_file", text(&theirs.file))],
            &["not trusted", "amqp.ca_file"],
        ),
        ("no file", &[("amqp.ca_file", text(&missing))], &["amqp.ca_file = ", "missing.pem"]),
        (
            "a file of something else",
            &[("amqp.ca_file", text(&junk))],
            &["amqp.ca_file = ", "no certificate in it"],
        ),
        (
            "no certificate of ours",
            &[("amqp.client_cert_file", ""), ("amqp.client_key_file", "")],
            &["client certificate", "amqp.client_cert_file and amqp.client_key_file"],
        ),
        (
            "a certificate that they do not trust",
            &[
                ("amqp.client_cert_file", text(&foreign.cert)),
                ("amqp.client_key_file", text(&foreign.key)),
            ],
            &["refuses the client certificate in amqp.client_cert_file", "UnknownCA"],
        ),
        (
            "another's key",
            &[("amqp.client_key_file", text(&foreign.key))],
            &["amqp.client_key_file = ", "not the key of the certificate"],
        ),
        (
            "no key",
            &[("amqp.client_key_file", text(&junk))],
            &["amqp.client_key_file = ", "no private key in it"],
        ),
        ("another host", &[("amqp.url", &elsewhere)], &["amqp.url, 127.0.0.1", "localhost"]),
        ("no TLS there", &[("amqp.url", &plain)], &["does not speak TLS", "amqp.url"]),
    ];
    for (what, settings, said) in cases {
        let mut setup = setup.clone();
        for (key, value) in settings {
            match *key {
                // It holds a password.
                "amqp.url" => {
                    setup.env.insert("ANGLER__AMQP__URL".into(), (*value).to_owned());
                }
                key => {
                    setup.set(key, value);
                }
            }
        }
        let (code, _, log) = setup.run(&["dead", "list"]);
        assert_eq!(code, 1, "{what}: {log}");
        for part in said {
            assert!(log.contains(part), "{what}: {part:?} is not in: {log}");
        }
        assert!(!log.contains(PASSWORD) && !log.contains("MIIsecret"), "{what}: {log}");
    }

    // A worker says the same, stays, and works once it can: when our file is there, and when the
    // broker has a certificate that is right.
    let late = folder.path().join("late.pem");
    setup.set("amqp.ca_file", text(&late));
    let worker = setup.launch().await;
    let says = async |part: &str| {
        eventually(part, async || worker.log().contains(part).then_some(())).await;
        let (status, text) = http_get(&format!("{}/readyz", worker.http)).unwrap();
        assert_eq!(status, 503, "{text}");
    };
    says("late.pem").await;
    std::fs::copy(&ours.file, &late).unwrap();
    worker.ready().await;
    broker.certificate(&ours.expired_server("localhost"));
    broker.restart();
    says("the broker's certificate expired at 2020-01-01T00:00:00Z").await;
    broker.certificate(&ours.server(&["localhost"]));
    broker.restart();
    worker.ready().await;
    assert!(!worker.log().contains(PASSWORD), "{}", worker.log());

    // The system's authorities are trusted beside those of the file.
    for (system, file, code) in [
        (Some(&ours), Some(&theirs), 0),
        (Some(&ours), None, 0),
        (Some(&theirs), Some(&ours), 0),
        (Some(&theirs), None, 1),
        (None, Some(&ours), 0),
    ] {
        system_trusts(&mut setup, system.map(|a| a.file.as_path()));
        setup.set("amqp.ca_file", file.map(|a| text(&a.file)).unwrap_or_default());
        let (ended, _, log) = setup.run(&["dead", "list"]);
        assert_eq!(ended, code, "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_several_addresses_speaks_tls_and_an_ipv6_one_is_checked_as_such() {
    let ours = Authority::new("ours");
    let broker = TlsBroker::start(&ours, &ours.server(&["localhost", "::1"]));
    let proxy = match Proxy::at("[::1]:0", &broker.tls_address()).await {
        Ok(proxy) => proxy,
        Err(error) => return println!("no IPv6 here: {error}"),
    };
    let client = ours.client();
    let mut setup = Setup::store();
    setup
        .set("amqp.ca_file", text(&ours.file))
        .set("amqp.client_cert_file", text(&client.cert))
        .set("amqp.client_key_file", text(&client.key));
    let url = broker.url("localhost");
    let ipv6 = url.replace(&format!("localhost:{}", broker.tls_port()), &proxy.address());
    setup.env.insert("ANGLER__AMQP__URL".into(), ipv6.clone());
    let (_, _, log) = setup.run(&["dead", "list"]);
    // It was let in: no worker has declared the queue yet.
    assert!(log.contains("no queue angler.dead") && proxy.accepted() > 0, "{log}");

    // What is wrong is said of each address.
    broker.certificate(&ours.server(&["elsewhere"]));
    broker.restart();
    setup.env.insert("ANGLER__AMQP__URL".into(), format!("{url},{ipv6}"));
    let (code, _, log) = setup.run(&["dead", "list"]);
    assert_eq!(code, 1, "{log}");
    for part in
        [format!("localhost:{}/%2f: ", broker.tls_port()), format!("{}/%2f: ", proxy.address())]
    {
        assert!(log.contains(&part), "{part} is not in: {log}");
    }
    assert_eq!(log.matches("is not for the host in amqp.url").count(), 2, "{log}");
    assert!(!log.contains(PASSWORD), "{log}");
}
