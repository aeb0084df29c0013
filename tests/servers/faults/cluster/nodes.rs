//! Three brokers that are one, by `tests/services/cluster.sh`.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::servers::Server;
use crate::support::{call, eventually, unique};

pub const NODES: [usize; 3] = [1, 2, 3];

/// A cluster of a test's own, and a virtual host on it.
pub struct Cluster {
    server: Server,
    vhost: String,
    /// Nodes that do not answer.
    away: Mutex<BTreeSet<usize>>,
}

impl Cluster {
    pub fn start() -> Self {
        let server = Server::unstarted("cluster.sh");
        server.start();
        let cluster = Self { server, vhost: unique("angler"), away: Mutex::default() };
        cluster.manage("PUT", &format!("vhosts/{}", cluster.vhost), None);
        let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
        let guest = format!("permissions/{}/guest", cluster.vhost);
        cluster.manage("PUT", &guest, Some(&all.to_string()));
        cluster
    }

    /// For `amqp.url`.
    pub fn url(&self) -> String {
        let url = |node| {
            let port = self.server.port(&format!("AMQP_{node}"));
            format!("amqp://guest:guest@127.0.0.1:{port}/{}", self.vhost)
        };
        NODES.map(url).join(",")
    }

    fn away(&self) -> std::sync::MutexGuard<'_, BTreeSet<usize>> {
        self.away.lock().unwrap()
    }

    /// One call of the management API, at any node that answers.
    fn manage(&self, method: &str, path: &str, body: Option<&str>) -> Value {
        let there = NODES.into_iter().filter(|node| !self.away().contains(node));
        let answers = there.filter_map(|node| {
            let port = self.server.port(&format!("MANAGEMENT_{node}"));
            call(&format!("http://127.0.0.1:{port}"), method, path, body).ok()
        });
        answers.into_iter().next().unwrap_or_default()
    }

    /// What the management API says of a queue.
    pub fn queue(&self, queue: &str) -> Value {
        self.manage("GET", &format!("queues/{}/{queue}", self.vhost), None)
    }

    /// Name, messages and leader of each queue, for a report.
    pub fn queues(&self) -> Vec<String> {
        let all = self.manage("GET", &format!("queues/{}", self.vhost), None);
        let of = |q: &Value| format!("{}: {} on {}", q["name"], q["messages"], q["leader"]);
        all.as_array().map(|all| all.iter().map(of).collect()).unwrap_or_default()
    }

    /// The node that leads a queue.
    pub async fn leader(&self, queue: &str) -> usize {
        eventually(&format!("{queue} has a leader"), async || {
            let leader = self.queue(queue)["leader"].as_str()?.to_owned();
            NODES.into_iter().find(|node| leader == format!("n{node}@localhost"))
        })
        .await
    }

    /// Until every node has its part of these queues again.
    pub async fn whole(&self, queues: &[&str]) {
        for queue in queues {
            eventually(&format!("{queue} is on all nodes"), async || {
                let online = self.queue(queue)["online"].as_array()?.len();
                (online == NODES.len()).then_some(())
            })
            .await;
        }
    }

    fn run(&self, command: &[&str], nodes: &[usize]) {
        let nodes: Vec<String> = nodes.iter().map(ToString::to_string).collect();
        let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
        self.server.run(&[command, &nodes].concat());
    }

    /// SIGKILL.
    pub fn kill(&self, nodes: &[usize]) {
        self.away().extend(nodes);
        self.run(&["kill"], nodes);
    }

    /// An orderly shutdown.
    pub fn shut_down(&self, node: usize) {
        self.away().insert(node);
        self.run(&["signal", "TERM"], &[node]);
    }

    /// Starts nodes again, and waits until they serve.
    pub fn bring_back(&self, nodes: &[usize]) {
        self.run(&["start"], nodes);
        self.run(&["wait"], nodes);
        self.away().retain(|node| !nodes.contains(node));
    }

    /// Nodes keep their connections and say nothing.
    pub async fn freeze(&self, nodes: &[usize], time: Duration) {
        self.away().extend(nodes);
        self.run(&["signal", "STOP"], nodes);
        tokio::time::sleep(time).await;
        self.run(&["signal", "CONT"], nodes);
        self.away().retain(|node| !nodes.contains(node));
    }
}
