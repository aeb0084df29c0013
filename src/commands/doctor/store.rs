//! The store: reached, logged in to, its buckets readable; and under `classes.root` whether it keeps to
//! the conditions that class sets are written with.

use std::net::IpAddr;

use futures_util::future::join_all;

use angler_storage::s3::S3Uri;
use angler_storage::s3::probe;
use angler_storage::s3::probe::{ConditionalWrite, Probe, Refusal};
use angler_wire::text::chain;

use super::report::{Check, State};
use super::{Silent, within};
use crate::app::App;
use crate::config::Settings;

pub(super) async fn check(app: &App) -> Vec<Check> {
    let settings = &app.settings;
    let mut checks: Vec<Check> = path_style(settings).into_iter().collect();
    let client = match app.s3_client().await {
        Ok(client) => client,
        Err(error) => {
            let remedy = "Correct the file, or the path in s3.ca_file.";
            checks.push(Check::problem("s3.ca_file", chain(error.as_ref()), remedy));
            return checks;
        }
    };
    let root = root(settings);
    let mut buckets = settings.s3.allowed_buckets.clone();
    buckets.extend(root.as_ref().map(|root| root.bucket.clone()));
    buckets.sort();
    buckets.dedup();
    if buckets.is_empty() {
        checks.push(no_bucket(settings, within(probe::buckets(&client)).await));
    }
    let looked = buckets.iter().map(async |bucket| {
        let probe = Probe::new(client.clone(), bucket);
        let root = root.as_ref().filter(|root| root.bucket == *bucket);
        let read = reading(settings, &probe, bucket, root).await;
        // Some stores refuse a condition for a bucket that is not there, which says nothing of it.
        let written = match root {
            Some(root) if read.state != State::Problem => writing(&probe, root).await,
            _ => None,
        };
        [Some(read), written]
    });
    checks.extend(join_all(looked).await.into_iter().flatten().flatten());
    checks
}

/// `classes.root`, if it lies in S3. One that is no address is told of with the class sets.
fn root(settings: &Settings) -> Option<S3Uri> {
    S3Uri::parse(&settings.classes.root).ok()
}

/// `bucket.127.0.0.1` is no host.
fn path_style(settings: &Settings) -> Option<Check> {
    let (endpoint, path_style) = (&settings.s3.endpoint, settings.s3.path_style);
    let (_, rest) = endpoint.split_once("://")?;
    let host = rest.split(['/', '?']).next().unwrap_or_default();
    let host = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let by_number = host.parse::<IpAddr>().is_ok();
    (by_number && !path_style).then(|| {
        Check::warning(
            "s3.path_style",
            format!("a bucket is asked for as BUCKET.{host}, which is no host"),
            "Set s3.path_style = true.",
        )
    })
}

fn place(settings: &Settings) -> String {
    match settings.s3.endpoint.as_str() {
        "" => "AWS".to_owned(),
        endpoint => endpoint.to_owned(),
    }
}

/// Without a bucket only the store itself can be asked, and many credentials may not ask that.
fn no_bucket(settings: &Settings, answer: Result<Result<usize, Refusal>, Silent>) -> Check {
    let (name, place) = ("store", place(settings));
    let known = "s3.allowed_buckets names none to look at, so images may come from any";
    match answer {
        Ok(Ok(1)) => Check::ok(name, format!("{place} answers and shows 1 bucket; {known}")),
        Ok(Ok(n)) => Check::ok(name, format!("{place} answers and shows {n} buckets; {known}")),
        Ok(Err(Refusal::Denied(_))) => {
            Check::ok(name, format!("{place} answers and takes the credentials; {known}"))
        }
        // Whoever only classifies files needs none.
        Ok(Err(refusal @ Refusal::NoCredentials(_))) => {
            Check::warning(name, refusal.to_string(), remedy(&refusal, "", settings))
        }
        Ok(Err(refusal)) => {
            let message = format!("{place}: {refusal}");
            Check::problem(name, message, remedy(&refusal, "", settings))
        }
        Err(silent) => Check::problem(name, format!("{place}: {silent}"), SILENT),
    }
}

const SILENT: &str = "Correct s3.endpoint, or look at what is between: a proxy, a firewall.";

/// Whether the bucket's objects can be listed and read.
async fn reading(settings: &Settings, probe: &Probe, bucket: &str, root: Option<&S3Uri>) -> Check {
    let name = format!("bucket {bucket}");
    let place = place(settings);
    let prefix = root.map(|root| root.key.as_str()).unwrap_or_default();
    let listed = match within(probe.first_key(prefix)).await {
        Ok(listed) => listed,
        Err(silent) => return Check::problem(name, format!("{place}: {silent}"), SILENT),
    };
    let listing = match &listed {
        Ok(_) => "listed",
        // Workers do not list; whoever may not may still read.
        Err(Refusal::Denied(_)) => "not listed",
        Err(refusal) => {
            let message = format!("{place}: {refusal}");
            return Check::problem(name, message, remedy(refusal, bucket, settings));
        }
    };
    let key = listed.ok().flatten();
    let is_known = key.is_some();
    let key = key.unwrap_or_else(|| hidden(prefix));
    match within(probe.read(&key)).await {
        Ok(Ok(_)) => {
            let how = match (listing, is_known) {
                ("listed", true) => "can be listed and read",
                ("listed", false) => "is empty; can be listed and read",
                _ => "can be read, not listed (angler classify and classes build list)",
            };
            Check::ok(name, format!("{place}: {how}"))
        }
        // S3 says so of what does not exist, too, to whoever may not list.
        Ok(Err(refusal @ Refusal::Denied(_))) if !is_known && listing == "not listed" => {
            Check::warning(
                name,
                format!("{place}: it may not be listed, so reading cannot be tried: {refusal}"),
                format!(
                    "Let them s3:GetObject on arn:aws:s3:::{bucket}/*, and s3:ListBucket on the \
                     bucket: without it a missing image is reported as access_denied."
                ),
            )
        }
        Ok(Err(refusal)) => {
            let message = format!("{place}: its objects cannot be read: {refusal}");
            Check::problem(name, message, remedy(&refusal, bucket, settings))
        }
        Err(silent) => Check::problem(name, format!("{place}: {silent}"), SILENT),
    }
}

/// A key that nobody has, and that listings of class sets pass over.
fn hidden(prefix: &str) -> String {
    let folder = prefix.trim_end_matches('/');
    let slash = if folder.is_empty() { "" } else { "/" };
    format!("{folder}{slash}.angler-doctor-{:016x}", fastrand::u64(..))
}

/// Whether two who write class sets at once would notice. None if the store has told already, with
/// reading, why it does not answer.
async fn writing(probe: &Probe, root: &S3Uri) -> Option<Check> {
    let name = "conditional writes";
    let needs = "angler classes build, import and activate";
    let unseen = "Use one that knows If-Match and If-None-Match (AWS S3, SeaweedFS, recent MinIO \
                  and Ceph do), or a folder as classes.root; else let only one person at a time \
                  write class sets.";
    Some(match within(probe.conditional_write(&hidden(&root.key))).await {
        Ok(Ok(ConditionalWrite::Refused)) => {
            Check::ok(name, format!("the store keeps to conditions, which {needs} rest on"))
        }
        Ok(Ok(ConditionalWrite::Unknown(said))) => Check::warning(
            name,
            format!("the store answers {said}: {needs} will fail; workers only read"),
            unseen,
        ),
        Ok(Ok(ConditionalWrite::Ignored)) => Check::problem(
            name,
            "the store writes whatever the condition says (what was written to try it is deleted \
             again): of two who activate at once, one overwrites the other unseen",
            unseen,
        ),
        Ok(Ok(ConditionalWrite::Left(what))) => Check::problem(
            name,
            format!("the store writes whatever the condition says; left behind: {what}"),
            unseen,
        ),
        Ok(Err(Refusal::Denied(_))) => Check::ok(
            name,
            format!("not tried: these credentials may not write, which only {needs} need"),
        ),
        Ok(Err(Refusal::Other(said))) => {
            let remedy = "Look at the store's log for what it was.";
            Check::warning(name, format!("the store answered {said} to a write"), remedy)
        }
        Ok(Err(_)) | Err(_) => return None,
    })
}

fn remedy(refusal: &Refusal, bucket: &str, settings: &Settings) -> String {
    let at_home = settings.s3.endpoint.is_empty();
    match refusal {
        Refusal::Unreachable(_) if at_home => {
            "Look at the network, or set s3.endpoint for another store than AWS's.".to_owned()
        }
        Refusal::Unreachable(_) => {
            "Start the store, or correct s3.endpoint (for an address that is a number, \
             s3.path_style = true)."
                .to_owned()
        }
        Refusal::NoCredentials(_) => "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or \
                                      AWS_PROFILE, or run with an instance role."
            .to_owned(),
        Refusal::WrongCredentials(_) => "Correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or \
                                         the profile, or renew the token); RequestTimeTooSkewed \
                                         means this machine's clock."
            .to_owned(),
        Refusal::Denied(_) => format!(
            "Let them s3:GetObject on arn:aws:s3:::{bucket}/* and s3:ListBucket on the bucket."
        ),
        Refusal::NoBucket => format!(
            "Make the bucket {bucket}, or correct its name in classes.root or s3.allowed_buckets; \
             with another store than AWS's look at s3.endpoint, too."
        ),
        Refusal::Elsewhere(_) => "Set s3.region to the bucket's region.".to_owned(),
        Refusal::Other(_) => "Look at the store's log for what it was.".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_to_try_lie_under_the_root_and_are_hidden() {
        assert!(hidden("a/b/").starts_with("a/b/.angler-doctor-"));
        assert!(hidden("a").starts_with("a/.angler-doctor-"));
        assert!(hidden("").starts_with(".angler-doctor-"));
        assert_ne!(hidden(""), hidden(""));
    }
}
