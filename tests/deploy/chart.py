"""Renders and checks deploy/helm/angler by Helm's own code (helm-python-sdk) and the schemas of Kubernetes.

Reads {"values": [files], "override": {...}} from standard input; prints {"findings": [...], "documents": [...]}. What
has no schema in Kubernetes itself (KEDA, the Prometheus operator) is left to tests/deploy/models.mjs.
"""

import json
import sys
from pathlib import Path

import helm_python as helm
import kubernetes_validate
import yaml

CHART = Path(__file__).resolve().parents[2] / "deploy/helm/angler"
# The oldest that Chart.yaml allows, and the newest that is known here.
VERSIONS = ["1.25.0", kubernetes_validate.latest_version()]
# Helm's severities: 1 is for information.
WARNING = 2


def merged(base: dict, other: dict) -> dict:
    """As Helm merges values files: maps key by key, anything else as a whole."""
    result = dict(base)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def main() -> None:
    asked = json.load(sys.stdin)
    values: dict = {}
    for name in asked["values"]:
        values = merged(values, yaml.safe_load((CHART / name).read_text()))
    values = merged(values, asked["override"])

    findings, documents = [], []
    try:
        lint = helm.lint(str(CHART), values, strict=True)
        findings += [f"lint: {m['path']}: {m['error']}" for m in lint["messages"] if m["severity"] >= WARNING]
        with helm.Chart.load(str(CHART)) as chart:
            chart.validate_schema(values)
            rendered = chart.render(values, name="test", namespace="angler")
    except helm.HelmError as error:
        findings.append(f"helm: {error}")
        rendered = {}
    for name, text in rendered.items():
        if name.endswith(".yaml"):
            documents += [document for document in yaml.safe_load_all(text) if document]
    for document in documents:
        group = document["apiVersion"].partition("/")[0]
        if group in ("keda.sh", "monitoring.coreos.com"):
            continue
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except Exception as error:  # Each kind of complaint is one.
                # The first line says it; the schema follows, in pages.
                complaint = str(error).partition("\n")[0]
                findings.append(f"kubernetes {version}: {document['kind']}: {complaint}")
    json.dump({"findings": findings, "documents": documents}, sys.stdout)


main()
