#!/usr/bin/env bash
# Three brokers that are one cluster, under load: the leader of the jobs queue is killed five times while runs are
# sent, a majority is away for 20 s, frozen and killed, each node is restarted in turn. Then every outcome is checked.
#
#   tests/cluster.sh [--release]
#
# It takes about five minutes. For RabbitMQ 4.x: eval "$(tests/services/rabbitmq4.sh)" before.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

profile=()
case ${1:-} in
'') ;;
--release) profile=(--release) ;;
*)
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
  exit 2
  ;;
esac
tests/services.sh install
# The store is of all tests; the brokers are the test's own.
dir=$(mktemp -d "$PWD/target/test-env/cluster.XXXX")
trap 'tests/services.sh down "$dir"' EXIT
tests/services.sh start "$dir"
tests/services.sh wait "$dir"
eval "$(tests/services.sh env "$dir")"
cargo test "${profile[@]}" --test servers faults::cluster:: -- --ignored --nocapture
