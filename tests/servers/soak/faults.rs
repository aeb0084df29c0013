//! What is done to workers, broker, queues, store, and the ways between them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::soak::fleet::Fleet;
use crate::soak::world::{CONSUMER_TIMEOUT, Credentials, World};
use crate::support::proxy::{self, Proxy};

/// RabbitMQ may lose a queue that was declared less than this before it is killed, with messages that it
/// has confirmed, and bring back one that was deleted. With one node nobody can do anything about that.
const SETTLED: Duration = Duration::from_secs(2);

/// What a fault is done to. Two faults at once are never done to the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    Workers,
    Broker,
    WayToBroker,
    Queues,
    Store,
    WayToStore,
}

/// How long a fault may last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasts {
    /// No time, or a few seconds; in a long soak now and then longer than the broker waits for acks.
    Briefly,
    /// Longer than the broker waits for heartbeats, or for acks: not for the short soak.
    Long,
}

/// One kind of fault.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    pub name: &'static str,
    pub subject: Subject,
    pub lasts: Lasts,
}

macro_rules! faults {
    ($($subject:ident { $($lasts:ident $name:literal)* })*) => {
        /// All kinds.
        pub const FAULTS: &[Fault] = &[$($(Fault {
            name: $name,
            subject: Subject::$subject,
            lasts: Lasts::$lasts,
        },)*)*];
    };
}

faults! {
    Workers {
        Briefly "worker killed"
        Briefly "worker drained"
        Long "worker stopped and continued"
        Long "all workers killed"
    }
    Broker {
        Briefly "broker killed"
        Briefly "broker's connections closed"
        Long "broker stopped and continued"
        Long "broker short of memory"
        Long "broker short of disk"
    }
    WayToBroker {
        Briefly "way to the broker cut"
        Briefly "way to the broker slow"
        Long "way to the broker silent"
    }
    Queues {
        Briefly "jobs queue full"
        Briefly "results queue full"
        Briefly "replies queue full"
        Briefly "runs' results queues full"
        Briefly "retry queues full"
        Briefly "every queue full"
    }
    Store {
        Briefly "store killed"
        Briefly "store stopped and continued"
        Briefly "store rejects the secret"
        Briefly "store knows no such key"
        Briefly "store's grant revoked"
    }
    WayToStore {
        Briefly "way to the store cut"
        Briefly "way to the store slow"
        Briefly "way to the store narrow"
        Briefly "way to the store silent"
        Briefly "store's answers broken off"
        Long "way to the store closed"
    }
}

/// The chosen lengths of a fault.
struct Lengths {
    /// Half a second to a few; now and then longer than the broker waits for acks.
    brief: Duration,
    /// Longer than the broker waits for heartbeats.
    long: Duration,
    /// Longer than it waits for acks; minutes in a soak of hours.
    alarm: Duration,
}

impl Lengths {
    fn new(world: &World, random: &mut fastrand::Rng) -> Self {
        let beyond_timeout = CONSUMER_TIMEOUT + Duration::from_secs_f64(1.0 + 5.0 * random.f64());
        let is_extended = random.f64() < 0.2 && !world.is_quick();
        let brief = match world.is_quick() {
            true => 0.5 + 1.0 * random.f64(),
            false => 0.5 + 3.0 * random.f64(),
        };
        let alarm = beyond_timeout.max(Duration::from_secs_f64(4.0 * world.minutes));
        Self {
            brief: match is_extended {
                true => beyond_timeout,
                false => Duration::from_secs_f64(brief),
            },
            long: Duration::from_secs_f64(6.0 + 3.0 * random.f64()),
            alarm: alarm.min(Duration::from_secs(180)),
        }
    }
}

/// Does one fault, from its beginning to its end. Yields when the broker served again, if it was
/// restarted.
pub async fn inject(
    fault: Fault,
    world: &Arc<World>,
    fleet: &Mutex<Fleet>,
    mut random: fastrand::Rng,
) -> Option<Instant> {
    let lengths = Lengths::new(world, &mut random);
    match fault.subject {
        Subject::Workers => {
            let mut fleet = fleet.lock().await;
            let number = random.usize(0..fleet.workers.len());
            workers(fault.name, &mut fleet, number, &lengths).await;
        }
        Subject::Broker => return broker(fault.name, world, &lengths).await,
        Subject::WayToBroker => way(fault.name, &world.to_broker, &lengths).await,
        Subject::Queues => queues(fault.name, world, lengths.brief).await,
        Subject::Store => store(fault.name, world, lengths.brief).await,
        Subject::WayToStore => way(fault.name, &world.to_store, &lengths).await,
    }
    None
}

/// Runs what waits for processes, while another fault goes on.
async fn apart(world: &Arc<World>, work: impl FnOnce(&World) + Send + 'static) {
    let world = Arc::clone(world);
    spawn_blocking(move || work(&world)).await.unwrap();
}

async fn workers(name: &str, fleet: &mut Fleet, number: usize, lengths: &Lengths) {
    match name {
        "worker killed" => fleet.kill(number).await,
        "worker drained" => fleet.drain(number).await,
        "worker stopped and continued" => {
            fleet.workers[number].signal("STOP");
            sleep(lengths.long).await;
            fleet.workers[number].signal("CONT");
        }
        "all workers killed" => {
            for _ in 0..fleet.workers.len() {
                fleet.kill(0).await;
            }
        }
        other => unreachable!("{other}"),
    }
}

async fn broker(name: &str, world: &Arc<World>, lengths: &Lengths) -> Option<Instant> {
    let server = &world.rabbitmq;
    let ctl = async |arguments: &'static [&'static str]| {
        apart(world, |world| drop(world.rabbitmq.ctl(arguments))).await;
    };
    match name {
        "broker killed" => {
            // Only commands declare and delete queues while the workers live.
            world.commands_to_broker.fault(proxy::Fault { black_hole: true, ..Default::default() });
            sleep(SETTLED).await;
            apart(world, |world| world.rabbitmq.kill()).await;
            world.commands_to_broker.heal();
            sleep(lengths.brief).await;
            apart(world, |world| world.rabbitmq.start()).await;
            return Some(Instant::now());
        }
        "broker stopped and continued" => {
            server.signal("STOP");
            sleep(lengths.long).await;
            server.signal("CONT");
        }
        "broker's connections closed" => {
            apart(world, |world| {
                for (name, own) in world.broker.connections() {
                    if own.starts_with("angler ") {
                        world.broker.cut(&name);
                    }
                }
            })
            .await;
        }
        "broker short of memory" => {
            ctl(&["set_vm_memory_high_watermark", "absolute", "1MB"]).await;
            sleep(lengths.alarm).await;
            ctl(&["set_vm_memory_high_watermark", "0.6"]).await;
        }
        "broker short of disk" => {
            ctl(&["set_disk_free_limit", "1000000GB"]).await;
            sleep(lengths.alarm).await;
            ctl(&["set_disk_free_limit", "50MB"]).await;
        }
        other => unreachable!("{other}"),
    }
    None
}

async fn queues(name: &str, world: &World, time: Duration) {
    let pattern = match name {
        "jobs queue full" => r"^angler\.jobs$",
        "results queue full" => r"^angler\.results$",
        "replies queue full" => r"^soak\.replies$",
        "runs' results queues full" => r"^angler\.run\.",
        "retry queues full" => r"^angler\.(retry\.|suspects$)",
        "every queue full" => r"^(angler|soak)\.",
        other => unreachable!("{other}"),
    };
    let policy = format!("policies/{}/full", world.broker.vhost);
    let full = json!({
        "pattern": pattern, "apply-to": "queues",
        "definition": {"max-length": 1, "overflow": "reject-publish"},
    });
    world.broker.insist("PUT", &policy, Some(&full.to_string())).await;
    sleep(time).await;
    world.broker.insist("DELETE", &policy, None).await;
}

async fn store(name: &str, world: &Arc<World>, time: Duration) {
    let server = &world.seaweedfs;
    let credentials = match name {
        "store killed" => {
            apart(world, |world| world.seaweedfs.kill()).await;
            sleep(time).await;
            return apart(world, |world| world.seaweedfs.start()).await;
        }
        "store stopped and continued" => {
            server.signal("STOP");
            sleep(time).await;
            return server.signal("CONT");
        }
        "store rejects the secret" => Credentials::WrongSecret,
        "store knows no such key" => Credentials::UnknownKey,
        "store's grant revoked" => Credentials::NoGrant,
        other => unreachable!("{other}"),
    };
    world.judge(credentials);
    sleep(time).await;
    world.judge(Credentials::Good);
}

async fn way(name: &str, way: &Proxy, lengths: &Lengths) {
    let quiet = proxy::Fault::default();
    let (fault, time) = match name {
        "way to the broker cut" | "way to the store cut" => return way.cut(),
        "way to the broker slow" | "way to the store slow" => {
            (proxy::Fault { latency: Duration::from_millis(80), ..quiet }, lengths.brief)
        }
        "way to the store narrow" => {
            (proxy::Fault { bytes_per_second: Some(50_000), ..quiet }, lengths.brief)
        }
        "way to the broker silent" => (proxy::Fault { black_hole: true, ..quiet }, lengths.long),
        "way to the store silent" => (proxy::Fault { black_hole: true, ..quiet }, lengths.brief),
        "way to the store closed" => {
            way.cut();
            (proxy::Fault { refuse: true, ..quiet }, lengths.long)
        }
        "store's answers broken off" => {
            (proxy::Fault { cut_after: Some(2_000), ..quiet }, lengths.brief)
        }
        other => unreachable!("{other}"),
    };
    way.fault(fault);
    sleep(time).await;
    way.heal();
}

/// Faults of all kinds in a random order, often two at once.
pub struct Injector {
    random: fastrand::Rng,
    world: Arc<World>,
    fleet: Arc<Mutex<Fleet>>,
    /// Those that come before any kind comes again.
    deck: Vec<Fault>,
    pub tally: Tally,
}

/// What was injected, and how soon work moved again.
#[derive(Default)]
pub struct Tally {
    pub faults: std::collections::BTreeMap<&'static str, usize>,
    pub pairs: std::collections::BTreeSet<(&'static str, &'static str)>,
    pub rounds_with_two: usize,
    /// From the end of a round's faults to the next result, and which faults they were.
    pub recoveries: Vec<(Duration, String)>,
    /// The same from the broker's start, where nothing else was wrong.
    pub restarts: Vec<Duration>,
}

/// How soon a result must come after the last fault.
const RECOVERY: Duration = Duration::from_secs(60);

impl Injector {
    pub fn new(world: &Arc<World>, fleet: &Arc<Mutex<Fleet>>) -> Self {
        Self {
            random: fastrand::Rng::with_seed(world.seed),
            world: Arc::clone(world),
            fleet: Arc::clone(fleet),
            deck: Vec::new(),
            tally: Tally::default(),
        }
    }

    /// The next kind; all kinds come once before any comes again. `None` if what is left is done to
    /// `but`.
    fn draw(&mut self, but: Option<Subject>) -> Option<Fault> {
        if self.deck.is_empty() {
            let quick = self.world.is_quick();
            let kinds = FAULTS.iter().filter(|fault| !quick || fault.lasts == Lasts::Briefly);
            self.deck = kinds.copied().collect();
            self.random.shuffle(&mut self.deck);
        }
        let at = self.deck.iter().rposition(|fault| Some(fault.subject) != but)?;
        Some(self.deck.remove(at))
    }

    /// One fault or two at once, from their beginning to the next result.
    pub async fn round(&mut self) {
        let first = self.draw(None).unwrap();
        let has_second = self.world.is_quick() || self.random.bool();
        let second = has_second.then(|| self.draw(Some(first.subject))).flatten();
        let faults: Vec<Fault> = [Some(first), second].into_iter().flatten().collect();
        let names: Vec<&str> = faults.iter().map(|fault| fault.name).collect();
        let names = names.join(" + ");
        println!("{names}");
        self.note(first, second);
        let injecting: Vec<_> = faults
            .into_iter()
            .map(|fault| inject(fault, &self.world, &self.fleet, self.random.fork()))
            .collect();
        let restarted = join_all(injecting).await.into_iter().flatten().next();
        self.recover(names, restarted, second.is_none()).await;
        let longest = if self.world.is_quick() { 0.5 } else { 2.0 };
        let pause = Duration::from_secs_f64(0.2 + longest * self.random.f64());
        sleep(pause).await;
    }

    fn note(&mut self, first: Fault, second: Option<Fault>) {
        let tally = &mut self.tally;
        *tally.faults.entry(first.name).or_default() += 1;
        if let Some(second) = second {
            *tally.faults.entry(second.name).or_default() += 1;
            tally.rounds_with_two += 1;
            tally.pairs.insert((first.name.min(second.name), first.name.max(second.name)));
        }
    }

    /// Waits for the next result.
    async fn recover(&mut self, names: String, restarted: Option<Instant>, alone: bool) {
        let ended = Instant::now();
        let next = loop {
            self.fleet.lock().await.look_after();
            if let Some(last) = self.world.ledger.last().filter(|last| *last > ended) {
                break last;
            }
            assert!(
                ended.elapsed() < RECOVERY,
                "seed {}: no result {RECOVERY:?} after {names}; without one {:?}, queues {:?}",
                self.world.seed,
                self.world.ledger.missing(),
                self.world.broker.depths(),
            );
            sleep(Duration::from_millis(20)).await;
        };
        self.tally.recoveries.push((next - ended, names));
        if let Some(restarted) = restarted.filter(|_| alone) {
            self.tally.restarts.push(next - restarted);
        }
    }
}
