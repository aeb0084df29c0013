#!/usr/bin/env bash
# Brings deploy/compose.yaml up, classifies the sample images through it, looks at what came of them, and takes it down.
#
#   docker build -f deploy/Dockerfile --target cpu -t angler:cpu .
#   deploy/smoke.sh            volumes go as well: do not run it on a compose project that you want to keep
#   deploy/smoke.sh --keep     leaves it running
#
# Wants Docker with Compose 2.23.1, curl and python3. Nothing waits without a deadline; exit code 0: all of it was as it should be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

keep=false
[[ ${1:-} != --keep ]] || keep=true
compose=(docker compose -f deploy/compose.yaml)
results=$(mktemp -d)
chmod 777 "$results" # the container's user is another one

say() { echo "smoke: $*" >&2; }
die() {
  say "$*"
  "${compose[@]}" logs --tail 40 worker-1 worker-2 >&2 || true
  exit 1
}
finish() {
  rm -rf "$results"
  $keep || timeout 120 "${compose[@]}" --profile tools down --volumes --remove-orphans >&2
}
trap finish EXIT

cli() { timeout 300 "${compose[@]}" run --rm --no-deps -T -v "$results:/results" cli "$@"; }
page() { curl --fail --silent --show-error --max-time 10 "$1"; }
# awaited WHAT COMMAND...: again and again until it succeeds, for a minute.
awaited() {
  local what=$1 end=$((SECONDS + 60))
  shift
  until "$@"; do
    ((SECONDS < end)) || die "not within a minute: $what"
    sleep 1
  done
}
# The value of a query to Prometheus, or nothing.
asked() {
  curl --fail --silent --max-time 10 --get http://127.0.0.1:9090/api/v1/query --data-urlencode "query=$1" |
    python3 -c 'import json, sys; r = json.load(sys.stdin)["data"]["result"]; print(r[0]["value"][1] if r else "")'
}

say 'starting'
timeout 420 "${compose[@]}" up -d --wait --wait-timeout 400 || die 'it did not come up'

say 'class vectors'
cli classes build /samples/fashion/reference --set fashion --version 1
cli classes activate fashion@1

say 'images'
cli enqueue s3://photos/query/ --classes fashion --run smoke --per-job 4 --wait --silence 60 --out /results/smoke.jsonl
expected=$(find samples/fashion/query -name '*.png' | wc -l)
python3 - "$results/smoke.jsonl" "$expected" <<'PYTHON' || die 'results are not as they should be'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
errors = [row for row in rows if "error" in row]
right = sum(row.get("label") == row["uri"].split("/")[-2] for row in rows)
print(f"smoke: {len(rows)} images, {len(errors)} errors, {right} as their folder says", file=sys.stderr)
sys.exit(len(rows) != int(sys.argv[2]) or bool(errors) or right < 0.6 * len(rows))
PYTHON

say 'metrics'
for port in 8081 8082; do
  page "http://127.0.0.1:$port/readyz" >/dev/null || die "the worker on port $port is not ready"
  [[ $(page "http://127.0.0.1:$port/metrics") == *$'\nangler_images_total{'* ]] || die "no angler_images_total on port $port"
done
counted() { [[ $(asked 'sum(angler_images_total)') == "$expected" ]]; }
awaited "Prometheus counts $expected images of both workers" counted
queues() { [[ $(asked 'count(rabbitmq_detailed_queue_messages{queue="angler.jobs"})') == 1 ]]; }
awaited 'Prometheus sees the queue of jobs' queues
[[ $(page http://127.0.0.1:3000/api/dashboards/uid/angler) == *angler_images_total* ]] || die 'Grafana has no dashboard'

say 'a worker stops in order'
timeout 60 "${compose[@]}" stop worker-1
[[ $(docker inspect --format '{{.State.ExitCode}}' "$("${compose[@]}" ps --all --quiet worker-1)") == 0 ]] ||
  die 'worker-1 did not end with 0'

say 'all of it works'
