// Checks objects that Kubernetes itself does not know by the types of KEDA and of the Prometheus operator.
// Reads a JSON list of objects from standard input; prints a JSON list of [kind, finding or null].
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "keda.sh/v1alpha1": "@kubernetes-models/keda",
  "monitoring.coreos.com/v1": "@kubernetes-models/prometheus-operator",
};

const checked = [];
for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  const name = PACKAGES[object.apiVersion];
  if (!name) continue;
  // By path: a module's import does not look into NODE_PATH.
  const path = join(process.env.NODE_PATH, name, object.apiVersion, "index.js");
  const Model = (await import(pathToFileURL(path)))[object.kind];
  let finding = Model ? null : `${object.apiVersion} has no ${object.kind}`;
  try {
    if (Model) new Model(object).validate();
  } catch (error) {
    finding = error.message;
  }
  checked.push([object.kind, finding]);
}
process.stdout.write(JSON.stringify(checked));
