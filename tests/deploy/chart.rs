//! The Helm chart: what it renders is valid, what it must not render is refused, and settings and pod agree.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use angler::config::Settings;

use crate::support::{repository, var};

/// Runs a program with JSON on its standard input; yields the JSON that it prints.
fn ask(command: &mut Command, input: &Value) -> Value {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    // Both are small beside a pipe's end that reads all of it first.
    child.stdin.take().unwrap().write_all(input.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{command:?}: {e}: {errors}"))
}

/// Objects of these values files and this override, and what Helm and Kubernetes' schemas say of them.
pub fn render(values: &[&str], change: &Value) -> (Vec<Value>, String) {
    let asked = json!({ "values": values, "override": change });
    let program = repository("tests/deploy/chart.py");
    let answer = ask(Command::new(var("ANGLER_TEST_PYTHON")).arg(program), &asked);
    let findings: Vec<&str> =
        answer["findings"].as_array().unwrap().iter().map(|f| f.as_str().unwrap()).collect();
    (answer["documents"].as_array().unwrap().clone(), findings.join("\n"))
}

/// What the types of KEDA and of the Prometheus operator say: kinds, each with its finding.
fn models(documents: &[Value]) -> Vec<(String, Option<String>)> {
    let packages = "@kubernetes-models/keda@2.0.0 @kubernetes-models/prometheus-operator@6.0.0";
    let answer = ask(
        Command::new(repository("tests/npm.sh"))
            .args(["kubernetes-models", packages])
            .arg(repository("tests/deploy/models.mjs")),
        &json!(documents),
    );
    serde_json::from_value(answer).unwrap()
}

pub fn kind<'a>(documents: &'a [Value], kind: &str) -> Option<&'a Value> {
    documents.iter().find(|d| d["kind"] == kind)
}

/// The settings that a worker in the pod reads.
fn settings(documents: &[Value]) -> Settings {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("angler.toml");
    let text = kind(documents, "ConfigMap").unwrap()["data"]["angler.toml"].as_str().unwrap();
    std::fs::write(&file, text).unwrap();
    Settings::load(Some(&file), &[]).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn gibibytes(quantity: &Value) -> u64 {
    quantity.as_str().unwrap().strip_suffix("Gi").unwrap().parse::<u64>().unwrap() << 30
}

/// What has to be true of any values.
fn check(documents: &[Value]) {
    let pod = &kind(documents, "Deployment").unwrap()["spec"]["template"]["spec"];
    let worker = &pod["containers"][0];
    let settings = settings(documents);

    let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
    let taken = settings.shutdown.grace_seconds + angler::app::AFTER_DRAIN.as_secs();
    assert!(grace > taken, "SIGKILL comes before the drain is over");
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(worker["securityContext"]["readOnlyRootFilesystem"], true);
    assert_eq!(worker["securityContext"]["allowPrivilegeEscalation"], false);
    assert_eq!(worker["securityContext"]["capabilities"]["drop"], json!(["ALL"]));
    assert_eq!(worker["livenessProbe"]["httpGet"]["path"], "/livez");
    assert_eq!(worker["readinessProbe"]["httpGet"]["path"], "/readyz");

    // README.md's bound, without the class vectors.
    let limits = &settings.limits;
    assert!(
        limits.decoders > 0,
        "as many decoders as the node has cores, whatever the pod may use"
    );
    let decoder = limits.image_pixels * 16 + limits.image_bytes as u64 + (16 << 20);
    let bound = limits.bytes_in_flight as u64 + limits.decoders as u64 * decoder;
    let memory = gibibytes(&worker["resources"]["limits"]["memory"]);
    assert!(bound < memory, "{bound} bytes may be taken of {memory}");

    let secret = |name: &str| {
        let found = worker["env"].as_array().unwrap().iter().find(|e| e["name"] == name);
        found.map(|e| e["valueFrom"]["secretKeyRef"].clone())
    };
    assert!(secret("ANGLER__AMQP__URL").unwrap().is_object(), "the broker's URL is a secret");
    for (name, key) in secret("AWS_SECRET_ACCESS_KEY").into_iter().map(|s| ("s3", s)) {
        assert!(key.is_object(), "{name}");
    }

    let selector = &kind(documents, "Deployment").unwrap()["spec"]["selector"]["matchLabels"];
    for (object, path) in [
        ("Service", "/spec/selector"),
        ("PodDisruptionBudget", "/spec/selector/matchLabels"),
        ("NetworkPolicy", "/spec/podSelector/matchLabels"),
    ] {
        assert_eq!(kind(documents, object).unwrap().pointer(path), Some(selector), "{object}");
    }
}

#[test]
fn a_collector_of_traces_is_let_through() {
    for (endpoint, port) in [
        ("http://collector:4318", Some(4318)),
        ("https://user:word@collector/otlp", Some(443)),
        ("http://[::1]:80", Some(80)),
        ("", None),
    ] {
        let change = json!({"settings": {"telemetry": {"otlp_endpoint": endpoint}}});
        let (documents, findings) = render(&[], &change);
        assert_eq!(findings, "");
        check(&documents);
        let ports = &kind(&documents, "NetworkPolicy").unwrap()["spec"]["egress"][1]["ports"];
        let ports: Vec<i64> =
            ports.as_array().unwrap().iter().map(|p| p["port"].as_i64().unwrap()).collect();
        let mut wanted = vec![5671, 5672, 443];
        wanted.extend(port.filter(|port| !wanted.contains(port)));
        assert_eq!(ports, wanted, "{endpoint}");
    }
}

/// Nothing but the node or EKS tells keys where no Secret does; Kubernetes refuses `rollingUpdate` beside `Recreate`.
#[test]
fn what_a_value_makes_needless_or_necessary_goes_or_comes_with_it() {
    for (secret, rules) in [("", 3), ("angler-s3", 2)] {
        let (documents, findings) = render(&[], &json!({"s3": {"secretName": secret}}));
        assert_eq!(findings, "");
        check(&documents);
        let egress = &kind(&documents, "NetworkPolicy").unwrap()["spec"]["egress"];
        assert_eq!(egress.as_array().unwrap().len(), rules, "{egress}");
    }
    let (documents, findings) = render(&[], &json!({"strategy": {"type": "Recreate"}}));
    assert_eq!(findings, "");
    check(&documents);
    let strategy = &kind(&documents, "Deployment").unwrap()["spec"]["strategy"];
    assert_eq!(*strategy, json!({"type": "Recreate"}));
}

/// Every option that adds or changes an object.
fn everything() -> Value {
    json!({
        "imagePullSecrets": [{"name": "registry"}],
        "s3": {"secretName": "angler-s3"},
        "settings": {"s3": {"allowed_buckets": ["photos", "more"]}, "classes": {"preload": ["bottles@7"]},
                     "embedder": {"graph_bytes": 2_000_000_000_u64, "tf32": true, "backend": "onnxruntime"}},
        "extraEnv": [{"name": "AWS_REGION", "value": "eu-central-1"}],
        "extraEnvFrom": [{"secretRef": {"name": "more"}}],
        "extraVolumes": [{"name": "authorities", "secret": {"secretName": "ca"}}],
        "extraVolumeMounts": [{"name": "authorities", "mountPath": "/ca", "readOnly": true}],
        "runtimeClassName": "nvidia", "priorityClassName": "batch",
        "service": {"annotations": {"a": "b"}}, "serviceAccount": {"annotations": {"a": "b"}},
        "podAnnotations": {"a": "b"}, "podLabels": {"team": "images"}, "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
            {"nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]}}},
        "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
        "podDisruptionBudget": {"minAvailable": "50%"},
        "networkPolicy": {"from": [{"namespaceSelector": {}}], "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
        "serviceMonitor": {"enabled": true, "labels": {"release": "prometheus"}},
        "autoscaling": {"enabled": true},
    })
}

#[test]
fn whatever_values_there_are_the_objects_are_valid() {
    let (zero, keda) = ("values-scale-to-zero.yaml", json!({"keda": {"enabled": true}}));
    for (values, change) in [
        (vec![], json!({})),
        (vec!["values-cpu.yaml"], json!({})),
        (vec!["values-gpu.yaml"], json!({})),
        (vec!["values-cpu.yaml", zero], json!({})),
        (vec!["values-gpu.yaml", zero], json!({"serviceMonitor": {"enabled": true}})),
        (vec!["values-cpu.yaml"], keda),
        (vec![], everything()),
    ] {
        let (documents, findings) = render(&values, &change);
        assert_eq!(findings, "", "{values:?} {change}");
        for (kind, finding) in models(&documents) {
            assert_eq!(finding, None, "{kind} of {values:?}");
        }
        check(&documents);
    }
}

#[test]
fn a_gpu_is_asked_for_and_never_doubled() {
    let (documents, _) = render(&["values-gpu.yaml"], &json!({}));
    let deployment = kind(&documents, "Deployment").unwrap();
    let resources = &deployment["spec"]["template"]["spec"]["containers"][0]["resources"];
    assert_eq!(resources["limits"]["nvidia.com/gpu"], 1);
    assert_eq!(deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"], 0);
}

#[test]
fn keda_counts_what_is_held_and_nobody_else_scales() {
    let zero = ["values-cpu.yaml", "values-scale-to-zero.yaml"];
    let queues = json!({"settings": {"amqp": {"jobs_queue": "angler.quick:8, angler.jobs"}},
                        "autoscaling": {"enabled": true}});
    let (documents, findings) = render(&zero, &queues);
    assert_eq!(findings, "");
    let scaled = &kind(&documents, "ScaledObject").unwrap()["spec"];
    assert_eq!(scaled["minReplicaCount"], 0);
    assert_eq!(scaled["fallback"]["behavior"], "currentReplicasIfHigher");
    let mut counted = Vec::new();
    for trigger in scaled["triggers"].as_array().unwrap() {
        let metadata = &trigger["metadata"];
        assert_eq!(trigger["type"], "rabbitmq");
        // Over AMQP a broker tells only what is ready, and KEDA would not say so.
        assert_eq!(metadata["protocol"], "http");
        assert_eq!(metadata["excludeUnacknowledged"], "false");
        counted.push(metadata["queueName"].as_str().unwrap());
    }
    let wanted = ["angler.quick", "angler.quick.suspects", "angler.jobs", "angler.suspects"];
    assert_eq!(counted, wanted);
    assert!(kind(&documents, "HorizontalPodAutoscaler").is_none(), "KEDA makes its own");
    assert!(kind(&documents, "Deployment").unwrap()["spec"].get("replicas").is_none());
    let host = &kind(&documents, "TriggerAuthentication").unwrap()["spec"]["secretTargetRef"][0];
    assert_eq!(host["parameter"], "host");

    let (documents, _) = render(&[], &json!({"autoscaling": {"enabled": true}}));
    assert!(kind(&documents, "HorizontalPodAutoscaler").is_some());
    assert!(kind(&documents, "ScaledObject").is_none());
}

#[test]
fn a_longer_drain_makes_a_longer_grace_period() {
    let (documents, findings) =
        render(&[], &json!({"settings": {"shutdown": {"grace_seconds": 600}}}));
    assert_eq!(findings, "");
    let pod = &kind(&documents, "Deployment").unwrap()["spec"]["template"]["spec"];
    assert_eq!(pod["terminationGracePeriodSeconds"], 615);
    check(&documents);
}

#[test]
fn values_that_are_wrong_are_refused() {
    for (change, why) in [
        (json!({"replicas": "two"}), "replicas"),
        (json!({"replicsa": 2}), "replicsa"),
        (json!({"keda": {"minReplica": 0}}), "minReplica"),
        (json!({"broker": {"secretName": ""}}), "secretName"),
        (json!({"settings": {"shutdown": {"grace_seconds": 0}}}), "grace_seconds"),
        (json!({"settings": {"shutdown": null}}), "shutdown"),
        (json!({"settings": {"amqp": {"url": "amqp://u:secret@b"}}}), "propertyName 'url'"),
        (json!({"settings": {"limit": {"decoders": 2}}}), "limit"),
        (json!({"terminationMarginSeconds": 0}), "terminationMarginSeconds"),
        (
            json!({"extraEnv": [{"name": "ANGLER__SHUTDOWN__GRACE_SECONDS", "value": "900"}]}),
            "grace period",
        ),
        (
            json!({"serviceMonitor": {"enabled": true}, "service": {"enabled": false}}),
            "needs service",
        ),
        // Helm knows nothing of these, Kubernetes does.
        (json!({"extraVolumes": [{"name": "a", "emptyDirr": {}}]}), "kubernetes"),
        (json!({"affinity": {"nodeAffinity": {"required": 1}}}), "kubernetes"),
        (json!({"tolerations": [{"key": 7}]}), "kubernetes"),
        (json!({"gpu": {"count": 1}, "resources": {"limits": {"memory": [1]}}}), "memory"),
    ] {
        let (_, findings) = render(&[], &change);
        assert!(findings.contains(why), "{change}: {findings:?}");
    }
}

#[test]
fn objects_that_keda_or_the_operator_would_refuse_are_found() {
    let zero = ["values-cpu.yaml", "values-scale-to-zero.yaml"];
    let (documents, _) = render(&zero, &json!({"serviceMonitor": {"enabled": true}}));
    for (object, path, value, why) in [
        ("ScaledObject", "/spec/minReplicaCount", json!("0"), "must be integer"),
        // Numbers among a trigger's metadata are the usual mistake.
        ("ScaledObject", "/spec/triggers/0/metadata/value", json!(16), "must be string"),
        ("TriggerAuthentication", "/spec/secretTargetRef/0", json!({"name": "a"}), "required"),
        ("ServiceMonitor", "/spec/endpoints/0/interval", json!("soon"), "pattern"),
    ] {
        let mut documents = documents.clone();
        let broken = documents.iter_mut().find(|d| d["kind"] == object).unwrap();
        *broken.pointer_mut(path).unwrap() = value;
        let found = models(&documents).into_iter().find(|(kind, _)| kind == object).unwrap().1;
        assert!(found.as_ref().is_some_and(|f| f.contains(why)), "{object} {path}: {found:?}");
    }
}
