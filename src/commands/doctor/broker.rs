//! The broker: reached, logged in to, its queues as a worker would declare them. Changes nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::{Connection, ErrorKind};

use angler_amqp::address::{Address, addresses};
use angler_amqp::connect::connect_to;
use angler_amqp::inspect::{Counts, Difference, Found, Server, greeting};
use angler_amqp::topology::Topology;
use angler_amqp::{AmqpError, AmqpOptions, close};
use angler_wire::text::chain;

use super::report::{Check, State};
use super::{Silent, within};
use crate::config::Settings;

/// The oldest RabbitMQ that everything works on.
const OLDEST: (u32, u32) = (3, 10);
/// The first one whose quorum queues have a delivery limit of their own.
const HAS_LIMIT: (u32, u32) = (4, 0);
/// RabbitMQ's own `consumer_timeout`: who holds a message longer loses it, and its channel. AMQP does
/// not tell what the broker's is.
const CONSUMER_TIMEOUT: Duration = Duration::from_secs(30 * 60);

pub(super) async fn check(settings: &Settings) -> Vec<Check> {
    let mut checks = reached(settings).await;
    checks.push(consumer_timeout(settings));
    checks
}

/// A node that lets a worker in.
struct Node {
    address: Address,
    server: Server,
    connection: Connection,
}

async fn reached(settings: &Settings) -> Vec<Check> {
    let options = settings.amqp_options("doctor");
    let addresses = match addresses(&options.url) {
        Ok(addresses) => addresses,
        Err(error) => return vec![Check::problem("amqp.url", error.to_string(), URL)],
    };
    let looked = join_all(addresses.into_iter().map(|address| look_at(&options, address))).await;
    let (checks, nodes): (Vec<_>, Vec<_>) = looked.into_iter().unzip();
    let mut checks: Vec<Check> = checks.into_iter().flatten().collect();
    let mut nodes = nodes.into_iter().flatten();
    let Some(Node { address, server, connection }) = nodes.next() else { return checks };
    for node in nodes {
        close(&node.connection).await;
    }
    // A worker uses another one meanwhile.
    for check in checks.iter_mut().filter(|check| check.state == State::Problem) {
        check.state = State::Warning;
    }
    let mut seen = BTreeSet::new();
    for lane in &settings.amqp.jobs_queue {
        let lane = settings.topology_of(lane);
        // Results, dead letters and announcements are shared.
        let of_lane = topology(&lane, &connection, &server, &address).await;
        checks.extend(of_lane.into_iter().filter(|check| seen.insert(check.name.clone())));
    }
    close(&connection).await;
    checks
}

/// Reaches one address and logs in there.
async fn look_at(options: &AmqpOptions, address: Address) -> (Vec<Check>, Option<Node>) {
    let place = address.host_and_port();
    let server = match within(greeting(options, &address)).await {
        Ok(Ok(server)) => server,
        Ok(Err(mut error)) => {
            // Over TLS a broker may hang up without a word; connecting listens for the reason.
            let told = matches!(error, AmqpError::Tls(_) | AmqpError::File(_));
            if address.is_tls()
                && !told
                && let Ok(Err(reason)) = within(connect_to(options, &address, "doctor")).await
            {
                error = reason;
            }
            return (vec![unreachable(&place, &error)], None);
        }
        Err(silent) => {
            let message = format!("{place}: {silent}");
            let remedy = format!("{UNREACHABLE} What listens there may be no broker.");
            return (vec![Check::problem("connection", message, remedy)], None);
        }
    };
    let mut checks = vec![version(&server, &place)];
    let connection = match within(connect_to(options, &address, "doctor")).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            checks.push(refused(&address, &error));
            return (checks, None);
        }
        Err(silent) => {
            let remedy = "Look at the broker's log: an alarm, or a backend of its logins.";
            checks.push(Check::problem("login", format!("{place}: {silent}"), remedy));
            return (checks, None);
        }
    };
    let who = address.user().map(|user| format!("user {user}"));
    let who = who.unwrap_or_else(|| "the user in amqp.url".to_owned());
    checks.push(Check::ok("login", format!("{address} accepts {who}")));
    (checks, Some(Node { address, server, connection }))
}

const URL: &str = "Write amqp.url as amqp://user:password@host:port/vhost (the vhost / is %2f).";
const UNREACHABLE: &str =
    "Start the broker, or correct host and port in amqp.url; a firewall may be between.";

fn unreachable(address: &str, error: &AmqpError) -> Check {
    let name = "connection";
    match error {
        AmqpError::Foreign => Check::problem(
            name,
            format!("{address}: {}", chain(error)),
            "Correct host and port in amqp.url; for a TLS listener it begins with amqps://.",
        ),
        AmqpError::File(_) => {
            Check::problem(name, chain(error), "Correct the file, or the path in the setting.")
        }
        AmqpError::Tls(_) => Check::problem(
            name,
            format!("{address}: {}", chain(error)),
            "See TLS in the README: amqp.ca_file, amqp.client_cert_file, amqp.client_key_file.",
        ),
        other => Check::problem(name, format!("{address}: {}", chain(other)), UNREACHABLE),
    }
}

fn version(server: &Server, address: &str) -> Check {
    let name = "connection";
    let message = format!("{} {} at {address}", server.product, server.version);
    if server.product != "RabbitMQ" {
        let remedy = "Use RabbitMQ 3.10 or later: its quorum queues are what jobs are safe in.";
        return Check::warning(name, format!("{message} is not RabbitMQ"), remedy);
    }
    match server.version() {
        Some(version) if version < OLDEST => {
            Check::problem(name, message, "Upgrade it: angler needs 3.10 or later.")
        }
        _ => Check::ok(name, message),
    }
}

/// Why a broker that is there does not let us in.
fn refused(address: &Address, error: &AmqpError) -> Check {
    let (user, vhost) = (user(address), &address.uri.vhost);
    let place = address.host_and_port();
    if let AmqpError::Broker(broker) = error
        && let ErrorKind::ProtocolError(said) = broker.kind()
    {
        let words = said.get_message().as_str();
        match said.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
                let local =
                    if user == "guest" { " (guest only logs in on its own host)" } else { "" };
                return Check::problem(
                    "login",
                    format!("{place} refuses user {user}: wrong user or password{local}"),
                    format!(
                        "Correct user and password in amqp.url, or set the password:\n  \
                         rabbitmqctl change_password {} PASSWORD",
                        quoted(user)
                    ),
                );
            }
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) if words.contains("not found") => {
                return Check::problem(
                    "virtual host",
                    format!("there is no virtual host {vhost} at {place}"),
                    format!(
                        "Correct the end of amqp.url (the vhost / is %2f), or make it:\n  \
                         rabbitmqctl add_vhost {}\n{}",
                        quoted(vhost),
                        permissions(user, vhost)
                    ),
                );
            }
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => {
                return Check::problem(
                    "virtual host",
                    format!("user {user} may not use the virtual host {vhost}"),
                    format!("Let it:\n{}", permissions(user, vhost)),
                );
            }
            _ => {}
        }
    }
    let message = format!("{place}: {}", chain(error));
    Check::problem("login", message, "Look at the broker's log for what it was.")
}

/// For a sentence or a command.
fn user(address: &Address) -> &str {
    address.user().unwrap_or("USER")
}

fn permissions(user: &str, vhost: &str) -> String {
    let (user, vhost) = (quoted(user), quoted(vhost));
    format!("  rabbitmqctl set_permissions -p {vhost} {user} '.*' '.*' '.*'")
}

/// For a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

async fn topology(
    topology: &Topology,
    connection: &Connection,
    server: &Server,
    address: &Address,
) -> Vec<Check> {
    let names = topology.queue_names();
    let queues = join_all(names.iter().map(async |name| {
        let found = within(topology.look_at(connection, name)).await;
        found_queue(topology, name, found, server, address)
    }));
    let control = async {
        let found = within(topology.look_at_control(connection)).await;
        let name = &topology.control_exchange;
        match found {
            Ok(Ok(Found::Different(_, difference))) => Check::problem(
                name.as_str(),
                format!("the exchange is another: {}", difference.text),
                "Name another amqp.control_exchange, or delete this one: a worker makes it anew.",
            ),
            Ok(Ok(Found::Same(_))) => Check::ok(name.as_str(), "the exchange is as it should be"),
            other => found_queue(topology, name, other, server, address),
        }
    };
    let (mut checks, control) = tokio::join!(queues, control);
    checks.push(control);
    checks
}

type Looked = Result<Result<Found, lapin::Error>, Silent>;

fn found_queue(
    topology: &Topology,
    name: &str,
    found: Looked,
    server: &Server,
    address: &Address,
) -> Check {
    match found {
        Ok(Ok(Found::Missing)) => {
            Check::ok(name, "not there yet: made at the first start of a worker")
        }
        Ok(Ok(Found::Same(counts))) => {
            Check::ok(name, format!("is as it should be; {}", counted(topology, name, counts)))
        }
        Ok(Ok(Found::Different(counts, difference))) => {
            different(topology, name, counts, &difference, server, address)
        }
        Ok(Err(error)) if denied(&error) => {
            let user = user(address);
            Check::warning(
                name,
                format!(
                    "is there, and a worker uses it unchanged; user {user} may not declare it, so its \
                     arguments were not compared"
                ),
                format!(
                    "To have them compared, let it:\n{}",
                    permissions(user, &address.uri.vhost)
                ),
            )
        }
        Ok(Err(error)) => {
            Check::problem(name, error.to_string(), "Look at the broker's log for what it was.")
        }
        Err(silent) => Check::problem(
            name,
            silent.to_string(),
            "Look at the broker: a quorum queue answers only with a majority of its nodes.",
        ),
    }
}

fn denied(error: &lapin::Error) -> bool {
    angler_amqp::refused(error).is_some_and(|(kind, _)| kind == AMQPSoftError::ACCESSREFUSED)
}

fn counted(topology: &Topology, name: &str, Counts { ready, consumers }: Counts) -> String {
    let messages = match ready {
        1 => "1 message ready".to_owned(),
        ready => format!("{ready} messages ready"),
    };
    let who = if name == topology.jobs { "worker" } else { "consumer" };
    let look = match ready {
        1.. if name == topology.dead => ": angler dead list shows them",
        _ => "",
    };
    match consumers {
        0 => format!("{messages}, no {who}{look}"),
        1 => format!("{messages}, 1 {who}{look}"),
        consumers => format!("{messages}, {consumers} {who}s{look}"),
    }
}

/// A queue that was declared by somebody else. Results and dead letters only want to be kept; with
/// the others it decides whether jobs are safe.
fn different(
    topology: &Topology,
    name: &str,
    counts: Counts,
    difference: &Difference,
    server: &Server,
    address: &Address,
) -> Check {
    let holds_jobs = name != topology.results && name != topology.dead;
    let suspects = topology.suspects_queue();
    let argument = difference.argument.as_deref().unwrap_or_default();
    let old = server.version().is_some_and(|version| version < HAS_LIMIT);
    let limit = argument == "x-delivery-limit" && difference.is_missing;
    let lower = argument == "x-delivery-limit" && !difference.is_missing;
    let unanswered = argument == "x-dead-letter-routing-key"
        && (name == topology.jobs || name == suspects)
        && difference.text.contains(&format!(" is {},", topology.dead));
    let meaning = match argument {
        "x-delivery-limit" if limit && holds_jobs && old => {
            ": before RabbitMQ 4 such a queue hands out a job that kills its worker for ever"
        }
        "x-delivery-limit" if limit && !old => {
            ": RabbitMQ takes 20, and drops what comes back more often"
        }
        "x-delivery-limit" if holds_jobs && lower => {
            ": connections that break count as well, so the broker may give up jobs that harm nobody"
        }
        "x-dead-letter-routing-key" if unanswered => {
            ": a job that the broker itself gives up goes there without a result"
        }
        "x-queue-type" if name == suspects || name == topology.jobs => {
            ": it is not replicated and does not count deliveries, so a job that kills its worker \
             is never given up"
        }
        "x-message-ttl" | "x-dead-letter-exchange" | "x-dead-letter-routing-key" => {
            ": its messages go elsewhere, or at another time"
        }
        "x-dead-letter-strategy" | "x-overflow" => {
            ": a dead letter is lost if the broker fails in between"
        }
        _ => "",
    };
    let message = format!(
        "{}{meaning}. A worker uses it as it is; {}",
        difference.text,
        counted(topology, name, counts)
    );
    let remedy = format!(
        "Stop the workers, empty it, delete it and start a worker, which makes it anew:\n  \
         rabbitmqctl delete_queue --vhost {} --if-empty {}\nor give it another name in [amqp].",
        quoted(&address.uri.vhost),
        quoted(name)
    );
    // Where the broker has a limit of its own, jobs are safe enough.
    let safe_enough = !holds_jobs || (limit && !old) || lower || unanswered;
    match safe_enough {
        true => Check::warning(name, message, remedy),
        false => Check::problem(name, message, remedy),
    }
}

/// A job that is not acked within the broker's time is taken away and counts as a failed delivery.
fn consumer_timeout(settings: &Settings) -> Check {
    let name = "consumer_timeout";
    let grace = settings.shutdown.grace_seconds;
    let longest = settings.limits.job_seconds + settings.amqp.blocked_seconds + grace as f64;
    let held = format!(
        "a worker holds a job for at most {longest} s (limits.job_seconds + amqp.blocked_seconds + \
         shutdown.grace_seconds)"
    );
    let minutes = CONSUMER_TIMEOUT.as_secs() / 60;
    if longest < CONSUMER_TIMEOUT.as_secs_f64() {
        let known = format!("the broker's default is {minutes} min; AMQP does not tell its own");
        return Check::ok(name, format!("{held}; {known}"));
    }
    let millis = (longest * 2000.0).ceil();
    Check::warning(
        name,
        format!(
            "{held}, but after {minutes} min, unless it is told otherwise, the broker takes the job \
             away and closes the channel"
        ),
        format!(
            "Lower limits.job_seconds, amqp.blocked_seconds or shutdown.grace_seconds, or raise it in the broker's \
             rabbitmq.conf:\n  \
             consumer_timeout = {millis}"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("angler.jobs"), "angler.jobs");
        assert_eq!(quoted("/"), "/");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's; rm"), r"'it'\''s; rm'");
        assert_eq!(quoted(""), "''");
    }
}
