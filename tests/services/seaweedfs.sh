#!/usr/bin/env bash
# A private SeaweedFS with its S3 API on free loopback ports, everything it writes under DIR.
#
#   seaweedfs.sh start DIR   starts it and returns at once; DIR/pid is its process, DIR/ports its ports
#   seaweedfs.sh wait DIR    until it takes objects
#   seaweedfs.sh kill DIR    SIGKILL; `start` brings it back with its data on the same ports
#   seaweedfs.sh stop DIR    the same: an orderly end takes 15 s
#   seaweedfs.sh env DIR     export lines for the tests
#
# DIR/s3.json holds the identities; a file that is there before `start` is kept, and SIGHUP to the process makes it read
# the file again. Before `start`: with DIR/tls.crt and DIR/tls.key (PEM) it speaks HTTPS too, on port S3_HTTPS of DIR/ports.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck disable=SC2154 # S3, MASTER, … come from DIR/ports

[[ $# -eq 2 ]] || die 'usage: seaweedfs.sh start|wait|stop|kill|env DIR'
command=$1 dir=$(realpath -m "$2")

find_weed() {
  local weed=${ANGLER_TEST_WEED:-}
  [[ $weed ]] || weed=$(realpath -m "$(dirname "${BASH_SOURCE[0]}")/../../target/test-env/venv/bin/weed")
  [[ -x $weed ]] || die 'SeaweedFS is missing: run tests/services.sh install'
  echo "$weed"
}

load_ports() {
  [[ -s $dir/ports ]] || die "$dir was never started"
  # shellcheck disable=SC1091
  . "$dir/ports"
}

configure() {
  mkdir -p "$dir"/{data,log}
  pick_ports "$dir/ports" S3 S3_GRPC MASTER MASTER_GRPC VOLUME VOLUME_GRPC FILER FILER_GRPC S3_HTTPS
  load_ports
  # A bucket's first object would otherwise create 7 volumes.
  printf '[master.volume_growth]\ncopy_1 = 1\ncopy_2 = 1\ncopy_3 = 1\ncopy_other = 1\n' >"$dir/master.toml"
  [[ ! -f $dir/s3.json ]] || return 0
  # One identity that may do everything, and one for tests of denied access: of all buckets it sees only `public`.
  cat >"$dir/s3.json" <<'JSON'
{"identities": [
  {"name": "all", "credentials": [{"accessKey": "testkey", "secretKey": "testsecret"}],
   "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
  {"name": "public-only", "credentials": [{"accessKey": "publickey", "secretKey": "publicsecret"}],
   "actions": ["Read:public", "List:public"]}
]}
JSON
}

start() {
  local weed options
  weed=$(find_weed)
  options=(
    -dir=data -ip=127.0.0.1 -ip.bind=127.0.0.1
    # Each port by hand: the defaults are fixed, and two runs side by side would meet there.
    -master.port="$MASTER" -master.port.grpc="$MASTER_GRPC"
    -volume.port="$VOLUME" -volume.port.grpc="$VOLUME_GRPC"
    -filer -filer.port="$FILER" -filer.port.grpc="$FILER_GRPC"
    -s3 -s3.port="$S3" -s3.port.grpc="$S3_GRPC" -s3.port.iceberg=0 -s3.port.lance=0
    # These sockets in DIR, not in /tmp; relative, since a socket's path is at most 107 bytes long.
    -s3.localSocket=s3.sock -filer.localSocket=filer.sock
    -s3.config="$dir/s3.json" -s3.iam=false
    -s3.autoCreateBucket=false        # as S3 does it: writing to no bucket is an error
    -master.telemetry=false           # it would report statistics over the network
    -master.electionTimeout=1s        # alone, it still waits for an election: 10 s
    -master.heartbeatInterval=200ms
    -master.volumeSizeLimitMB=64      # small volumes, and many: every bucket has its own,
    -volume.max=1000                  # and with the default of 8 the ninth bucket takes no object
    -volume.minFreeSpace=100MiB       # else 1 % of the disk, below which it is read-only: gigabytes on a large one
  )
  if [[ -f $dir/tls.crt ]]; then
    options+=(-s3.port.https="$S3_HTTPS" -s3.cert.file="$dir/tls.crt" -s3.key.file="$dir/tls.key")
  fi
  # setsid: Ctrl-C in the terminal is for the test run, which then stops the server. It is in DIR from its first moment:
  # whoever asks whether it lives looks for that.
  (
    cd "$dir"
    setsid "$weed" -config_dir="$dir" -logtostderr=true server "${options[@]}" </dev/null >>log/weed.log 2>&1 &
    echo $! >pid
  )
}

# The S3 side answers early; an object can be stored once the master has a volume to assign.
serves() {
  [[ $(get "$S3" /healthz) == HTTP/1.?' 200'* && $(get "$MASTER" /dir/assign) == *'"fid"'* ]]
}

# It leaves these behind, and their names cannot be set.
remove_sockets() {
  load_ports
  rm -f "/tmp/seaweedfs-s3-grpc-$S3_GRPC.sock" "/tmp/seaweedfs-master-grpc-$MASTER_GRPC.sock" \
    "/tmp/seaweedfs-volume-grpc-$VOLUME_GRPC.sock" "/tmp/seaweedfs-filer-grpc-$FILER_GRPC.sock"
}

case $command in
start)
  pid_of "$dir" pid >/dev/null && exit 0
  configure
  start
  ;;
wait)
  load_ports
  wait_for "$dir" serves
  ;;
stop | kill)
  kill_and_wait "$dir" pid
  [[ ! -s $dir/ports ]] || remove_sockets
  ;;
env)
  load_ports
  echo "export ANGLER_TEST_S3_ENDPOINT=http://127.0.0.1:$S3"
  echo 'export ANGLER_TEST_S3_KEY=testkey ANGLER_TEST_S3_SECRET=testsecret'
  echo 'export ANGLER_TEST_S3_RO_KEY=publickey ANGLER_TEST_S3_RO_SECRET=publicsecret'
  printf 'export ANGLER_TEST_WEED=%q\n' "$(find_weed)"
  ;;
*) die "unknown command: $command" ;;
esac
