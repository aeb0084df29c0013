//! A broker or a store of a test's own, to be killed, stopped and brought back.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{repository, unique};

/// A server that runs until it is dropped.
pub struct Server {
    script: PathBuf,
    dir: PathBuf,
}

impl Server {
    /// A RabbitMQ with these lines in its rabbitmq.conf.
    pub fn rabbitmq(extra: &str) -> Self {
        let server = Self::unstarted("rabbitmq.sh");
        std::fs::write(server.dir.join("extra.conf"), extra).unwrap();
        server.start();
        server
    }

    /// A SeaweedFS.
    pub fn seaweedfs() -> Self {
        let server = Self::unstarted("seaweedfs.sh");
        server.start();
        server
    }

    /// One to be configured in its folder before it is started.
    pub fn unstarted(script: &str) -> Self {
        let script = repository("tests/services").join(script);
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(unique("server"));
        std::fs::create_dir_all(&dir).unwrap();
        // A test that is killed drops nothing: then this ends the server.
        let reaper = "trap '' INT TERM HUP; while kill -0 $0 2>/dev/null; do sleep 0.5; done; \
                      \"$1\" stop \"$2\"; rm -rf \"$2\"";
        let mut command = Command::new("setsid");
        command.args(["bash", "-c", reaper, &std::process::id().to_string()]);
        let silent = command.arg(&script).arg(&dir).stdin(Stdio::null()).stdout(Stdio::null());
        drop(silent.stderr(Stdio::null()).spawn().unwrap());
        Self { script, dir }
    }

    /// All that it reads and writes.
    pub fn folder(&self) -> &Path {
        &self.dir
    }

    /// A port, by its name in the script.
    pub fn port(&self, name: &str) -> u16 {
        let ports = std::fs::read_to_string(self.dir.join("ports")).unwrap();
        let mut ports = ports.lines().filter_map(|line| line.split_once('='));
        ports.find(|port| port.0 == name).unwrap().1.parse().unwrap()
    }

    /// A command of its script, with more arguments behind its folder.
    pub fn run(&self, arguments: &[&str]) -> String {
        let (command, rest) = arguments.split_first().unwrap();
        // To a file: what it starts keeps a pipe open for ever.
        let path = self.dir.join("output");
        let output = std::fs::File::create(&path).unwrap();
        let mut run = Command::new(&self.script);
        run.arg(command).arg(&self.dir).args(rest).stdin(Stdio::null());
        let status = run.stdout(output.try_clone().unwrap()).stderr(output).status().unwrap();
        let said = std::fs::read_to_string(path).unwrap();
        assert!(status.success(), "{arguments:?}: {status}\n{said}");
        said
    }

    /// Starts it, anew after a kill with the same data and ports, and waits until it serves.
    pub fn start(&self) {
        self.run(&["start"]);
        self.run(&["wait"]);
    }

    /// SIGKILL.
    pub fn kill(&self) {
        self.run(&["kill"]);
    }

    /// SIGSTOP or SIGCONT.
    pub fn signal(&self, name: &str) {
        let pid = std::fs::read_to_string(self.dir.join("pid")).unwrap();
        let sent = Command::new("kill").arg(format!("-{name}")).arg(pid.trim()).status().unwrap();
        assert!(sent.success());
    }

    /// `rabbitmqctl`.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        self.run(&[&["ctl"], arguments].concat())
    }

    /// Makes a RabbitMQ return what is published to a queue that exists, as while it starts or the queue's
    /// leader changes. `false` from 4.0 on, whose table of queues is another.
    pub fn hide(&self, vhost: &str, queue: &str) -> bool {
        let hide = "case code:which(khepri) of non_existing -> mnesia:dirty_delete(rabbit_queue, R); _ -> no end";
        !self.eval_of(vhost, queue, hide).contains("no")
    }

    /// Ends that.
    pub fn show(&self, vhost: &str, queue: &str) {
        let show = "[Q] = mnesia:dirty_read(rabbit_durable_queue, R), ok = mnesia:dirty_write(rabbit_queue, Q)";
        self.eval_of(vhost, queue, show);
    }

    /// Evaluates an expression with the name of a queue as `R`.
    fn eval_of(&self, vhost: &str, queue: &str, expression: &str) -> String {
        let name = format!("R = rabbit_misc:r(<<\"{vhost}\">>, queue, <<\"{queue}\">>)");
        self.ctl(&["eval", &format!("{name}, {expression}.")])
    }

    /// A variable as `tests/services.sh env` would set it for this server.
    pub fn var(&self, name: &str) -> String {
        let lines = self.run(&["env"]);
        let words = lines.split_whitespace();
        let value = words.filter_map(|word| word.strip_prefix(name)?.strip_prefix('=')).next();
        value.unwrap_or_else(|| panic!("no {name} in:\n{lines}")).to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new(&self.script).arg("stop").arg(&self.dir).status();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
