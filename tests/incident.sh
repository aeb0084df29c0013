#!/usr/bin/env bash
# An incident of four acts, seen only by what people on call have: the alerts, the dashboard's queries, the workers' page.
#
#   tests/incident.sh                 the broker is killed; active.json names a version that is not there; a version of
#                                     another model is made active; a job is no JSON. After each of them it is mended
#   tests/incident.sh broker job      only these of: broker vectors model job
#
# Two workers (ANGLER=…, default target/release/angler), a broker and a store of their own, a Prometheus with
# deploy/prometheus as it is but for the addresses, and jobs all the while. Exit code 0: at each act the alerts that
# docs/operations.md names fired, no other did, panels and page said what was wrong, and all of it was over after the
# mending; every job has its result. Alerts wait as long as their rules say: 23 minutes in all, the last 15 of
# them since AnglerDeadLetters looks so far back. What was seen is kept: target/tmp/incident.log and incident-*.png.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

say() { echo "incident: $*" >&2; }
usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}
acts=("$@")
((${#acts[@]})) || acts=(broker vectors model job)
for act in "${acts[@]}"; do
  [[ $act == broker || $act == vectors || $act == model || $act == job ]] || usage
done

# shellcheck source-path=SCRIPTDIR source=services/common.sh
. tests/services/common.sh
angler=$(realpath -m "${ANGLER:-target/release/angler}")
[[ -x $angler ]] || die "there is no $angler: cargo build --release --locked, or ANGLER=…"

tests/services.sh install
type -P prometheus >/dev/null || die 'there is promtool, but no program prometheus (Debian: apt-get install prometheus)'
# Settings of who runs this must not reach the workers.
for name in $(compgen -v ANGLER__); do unset "$name"; done

mkdir -p target/test-env target/tmp
dir=$(mktemp -d "$root/target/test-env/incident.XXXX")
mkdir "$dir"/{rabbitmq,prometheus,worker-1,worker-2,python}
watcher=''

cleanup() {
  local status=$? name
  trap '' INT TERM HUP
  if [[ $watcher ]] && kill -TERM -- "-$watcher" 2>/dev/null; then
    wait "$watcher" || true
  fi
  for name in worker-1 worker-2 prometheus; do kill_and_wait "$dir/$name" pid; done
  tests/services.sh stop "$dir" || true
  if ((status == 0)); then
    rm -rf "$dir"
  else # the logs may say why; the data goes
    rm -rf "$dir"/rabbitmq/mnesia "$dir"/seaweedfs/data "$dir"/prometheus/data
    say "logs are kept in ${dir#"$root"/}"
  fi
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# The metrics' port is the one that is kept free for TLS. The broker is killed and started again: the same plugins then.
printf 'prometheus.tcp.ip = 127.0.0.1\nprometheus.tcp.port = @TLS@\n' >"$dir/rabbitmq/extra.conf"
export RABBITMQ_PLUGINS=rabbitmq_prometheus
tests/services.sh start "$dir"
tests/services.sh wait "$dir"
eval "$(tests/services.sh env "$dir")"
# shellcheck disable=SC1091
. "$dir/rabbitmq/ports"
# shellcheck disable=SC1091
. "$dir/seaweedfs/ports"
pick_ports "$dir/ports" WORKER_1 WORKER_2 PROMETHEUS
# shellcheck disable=SC1091
. "$dir/ports"
# shellcheck disable=SC2154 # TLS, MASTER, WORKER_1, … come from these files

printf 's3.bucket.create -name %s\n' models photos |
  timeout 60 "$ANGLER_TEST_WEED" shell -master="127.0.0.1:$MASTER.$MASTER_GRPC" -filer="127.0.0.1:$FILER.$FILER_GRPC" \
    >"$dir/seaweedfs/log/buckets.log" 2>&1 || die "no buckets, see $dir/seaweedfs/log/buckets.log"

# As deploy/compose.yaml has it: one session and one decoder each, all else as by default.
settings=(
  ANGLER__AMQP__URL="$ANGLER_TEST_AMQP_URL"
  ANGLER__S3__ENDPOINT="$ANGLER_TEST_S3_ENDPOINT" ANGLER__S3__PATH_STYLE=true
  AWS_ACCESS_KEY_ID="$ANGLER_TEST_S3_KEY" AWS_SECRET_ACCESS_KEY="$ANGLER_TEST_S3_SECRET"
  ANGLER__CLASSES__ROOT=s3://models/classes
  ANGLER__EMBEDDER__BACKEND=onnxruntime ANGLER__EMBEDDER__ONNXRUNTIME_LIBRARY="$ANGLER_TEST_ONNXRUNTIME"
  ANGLER__EMBEDDER__SESSIONS=1 ANGLER__LIMITS__DECODERS=1
)

# run_in NAME COMMAND...: in the background, in a folder and a session of its own; its pid in DIR/NAME/pid.
run_in() {
  local folder=$dir/$1
  shift
  (
    cd "$folder"
    exec setsid "$@" </dev/null >>log 2>&1
  ) &
  echo $! >"$folder/pid"
  disown # bash need not tell of its end
}

workers=()
for number in 1 2; do
  port=WORKER_$number
  run_in "worker-$number" env "${settings[@]}" ANGLER__HTTP__LISTEN="127.0.0.1:${!port}" ANGLER__LOG__FORMAT=json "$angler" worker
  workers+=("worker-$number=http://127.0.0.1:${!port}")
done

# The configuration that is shipped, with other addresses; the rules are read where they lie.
sed -e "s|worker-1:8080, worker-2:8080|127.0.0.1:$WORKER_1, 127.0.0.1:$WORKER_2|" -e "s|rabbitmq:15692|127.0.0.1:$TLS|" \
  -e "s|- alerts.yml|- $root/deploy/prometheus/alerts.yml|" deploy/prometheus/prometheus.yml >"$dir/prometheus/prometheus.yml"
(($(grep -c '127.0.0.1:' "$dir/prometheus/prometheus.yml") == 2)) || die 'deploy/prometheus/prometheus.yml has other targets than this script knows'
run_in prometheus prometheus --config.file=prometheus.yml --storage.tsdb.path=data --web.listen-address="127.0.0.1:$PROMETHEUS"

# In a process group of its own and waited for, so that a signal is acted on at once.
set -m
env "${settings[@]}" PYTHONDONTWRITEBYTECODE=1 ANGLER="$angler" BROWSER="$ANGLER_TEST_BROWSER" \
  "$ANGLER_TEST_PYTHON" tests/incident/main.py --folder "$dir" --filer "http://127.0.0.1:$FILER" \
  --prometheus "http://127.0.0.1:$PROMETHEUS" --workers "${workers[@]}" --acts "${acts[@]}" </dev/null &
watcher=$!
set +m
wait "$watcher" # whose exit code is this script's
watcher=''
