#!/usr/bin/env bash
# Faults of every kind at random, often two at once, under load; then every job's outcome is checked, and every run's file.
#
#   tests/soak.sh [--minutes N] [--seed S] [--release] [--rabbitmq4]
#
# Half a minute of it, with a fixed seed and without the longest faults, is part of the tests. The seed decides on faults,
# durations, jobs and runs; how the processes interleave is the machine's. --rabbitmq4 fetches the newest RabbitMQ 4.x
# (tests/services/rabbitmq4.sh) and breaks that one; ANGLER_TEST_RABBITMQ_SBIN names any other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export ANGLER_SOAK_MINUTES=10 ANGLER_SOAK_SEED=$RANDOM
profile=()
while (($#)); do
  case $1 in
  --minutes) ANGLER_SOAK_MINUTES=$2 && shift 2 ;;
  --seed) ANGLER_SOAK_SEED=$2 && shift 2 ;;
  --release) profile=(--release) && shift ;;
  --rabbitmq4)
    sbin=$(tests/services/rabbitmq4.sh)
    eval "$sbin"
    shift
    ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
  esac
done
echo "soak: $ANGLER_SOAK_MINUTES minutes, seed $ANGLER_SOAK_SEED" >&2
tests/services.sh install
# It starts servers of its own; what it takes from the environment are paths and keys.
dir=$(mktemp -d "$PWD/target/test-env/soak.XXXX")
trap 'tests/services.sh down "$dir"' EXIT
tests/services.sh start "$dir"
tests/services.sh wait "$dir"
eval "$(tests/services.sh env "$dir")"
cargo test "${profile[@]}" --test servers soak:: -- --nocapture
