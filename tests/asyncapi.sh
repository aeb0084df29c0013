#!/usr/bin/env bash
# Checks docs/asyncapi.yaml, or the file that is named, with AsyncAPI's own parser, which comes from npm.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
document=$(realpath "${1:-$root/docs/asyncapi.yaml}")
exec "$root/tests/npm.sh" asyncapi @asyncapi/parser@3.6.3 "$root/tests/servers/contracts/asyncapi.cjs" "$document"
