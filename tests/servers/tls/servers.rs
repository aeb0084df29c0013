//! A RabbitMQ and a SeaweedFS of a test's own, by the scripts that start those of all tests.

use std::path::Path;

use serde_json::json;

use crate::support::servers::Server;
use crate::support::{Client, Setup, management_at, repository};
use crate::tls::pki::{Authority, Pair};

/// What must never be in a log.
pub const PASSWORD: &str = "hunter2-is-my-word";

fn put(server: &Server, name: &str, from: &Path) {
    std::fs::copy(from, server.folder().join(name)).unwrap();
}

/// A broker whose TLS port demands a client certificate; user `angler`.
pub struct TlsBroker(Server);

impl TlsBroker {
    pub fn start(authority: &Authority, pair: &Pair) -> Self {
        let broker = Self(Server::unstarted("rabbitmq.sh"));
        put(&broker.0, "ca.pem", &authority.file);
        broker.certificate(pair);
        let folder = broker.0.folder().display().to_string();
        let conf = format!(
            "listeners.ssl.1 = 127.0.0.1:@TLS@\n\
             ssl_options.cacertfile = {folder}/ca.pem\n\
             ssl_options.certfile = {folder}/server.crt\n\
             ssl_options.keyfile = {folder}/server.key\n\
             ssl_options.verify = verify_peer\n\
             ssl_options.fail_if_no_peer_cert = true\n"
        );
        std::fs::write(broker.0.folder().join("extra.conf"), conf).unwrap();
        broker.0.start();
        let management = format!("http://127.0.0.1:{}", broker.0.port("MANAGEMENT"));
        let call = |path: &str, body: serde_json::Value| {
            management_at(&management, "PUT", path, Some(&body.to_string()))
        };
        call("users/angler", json!({"password": PASSWORD, "tags": ""}));
        let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
        call("permissions/%2f/angler", all);
        broker
    }

    /// Another certificate from its next start on.
    pub fn certificate(&self, pair: &Pair) {
        put(&self.0, "server.crt", &pair.cert);
        put(&self.0, "server.key", &pair.key);
    }

    pub fn restart(&self) {
        self.0.kill();
        self.0.start();
    }

    pub fn tls_port(&self) -> u16 {
        self.0.port("TLS")
    }

    /// `host:port` of its TLS listener.
    pub fn tls_address(&self) -> String {
        format!("127.0.0.1:{}", self.tls_port())
    }

    /// `amqps://`, under a host name of this machine.
    pub fn url(&self, host: &str) -> String {
        format!("amqps://angler:{PASSWORD}@{host}:{}/%2f", self.0.port("TLS"))
    }

    /// `amqps://` to the port that speaks AMQP without TLS.
    pub fn url_without_tls(&self) -> String {
        format!("amqps://angler:{PASSWORD}@localhost:{}/%2f", self.0.port("AMQP"))
    }

    /// A producer, on the port without TLS.
    pub async fn connect(&self) -> Client {
        Client::new(&format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.0.port("AMQP"))).await
    }
}

/// A store that speaks HTTP and HTTPS.
pub struct TlsStore(Server);

impl TlsStore {
    pub fn start(pair: &Pair) -> Self {
        let store = Self(Server::unstarted("seaweedfs.sh"));
        put(&store.0, "tls.crt", &pair.cert);
        put(&store.0, "tls.key", &pair.key);
        store.0.start();
        store
    }

    pub fn https(&self, host: &str) -> String {
        format!("https://{host}:{}", self.0.port("S3_HTTPS"))
    }

    pub fn http(&self) -> String {
        format!("http://127.0.0.1:{}", self.0.port("S3"))
    }
}

/// A machine whose system trusts the authorities of this file, or none.
pub fn system_trusts(setup: &mut Setup, file: Option<&Path>) {
    let nothing = repository("tests/data/README.md");
    let file = file.unwrap_or(&nothing);
    setup.env.insert("SSL_CERT_FILE".into(), file.to_str().unwrap().into());
    setup.env.remove("SSL_CERT_DIR");
}
