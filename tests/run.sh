#!/usr/bin/env bash
# Runs every test, with the servers that some of them need.
#
#   tests/run.sh                 every test
#   tests/run.sh worker          those whose name contains `worker`
#   tests/run.sh -- ARGS...      ARGS go to the test runner: cargo nextest if it is there, else cargo test
#
# The first run installs what is missing (tests/services.sh says what, and where). Each run has servers and a folder
# of its own, so runs side by side do not meet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

say() { echo "tests: $*" >&2; }
die() {
  say "$*"
  exit 1
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit
fi
[[ ${1:-} != -- ]] || shift

command -v cargo >/dev/null || die 'cargo is missing: install Rust with rustup'
command -v cc >/dev/null || die 'a C compiler is missing (Debian: apt-get install build-essential)'
if cargo nextest --version >/dev/null 2>&1; then
  runner=(cargo nextest run) quiet=--cargo-quiet
else
  runner=(cargo test --tests) quiet=--quiet # the doc tests have a run of their own, with either runner
fi

tests/services.sh install
mkdir -p target/test-env

# What a run that was killed outright left: its servers at once, its logs after a day.
for old in target/test-env/run.*; do
  [[ -f $old/owner && ! -d /proc/$(cat "$old/owner") ]] || continue
  tests/services.sh stop "$root/$old"
  [[ -z $(find "$old" -maxdepth 0 -mmin +1440) ]] || rm -rf "$old"
done

dir=$(mktemp -d "$root/target/test-env/run.XXXX")
echo $$ >"$dir/owner"
child=''

cleanup() {
  local status=$?
  trap '' INT TERM HUP
  if [[ $child ]] && kill -TERM -- "-$child" 2>/dev/null; then
    wait "$child" || true
  fi
  tests/services.sh stop "$dir" || true
  if ((status == 0)); then
    rm -rf "$dir"
  else # the logs may say why; the data goes
    rm -rf "$dir"/rabbitmq/mnesia "$dir"/seaweedfs/data
  fi
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# In a process group of its own and waited for: bash acts on a signal at once only while it waits, and then the whole
# group (cargo, test runner, tests) can be ended.
run() {
  local status=0
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  wait "$child" || status=$?
  child=''
  return "$status"
}

# The servers get ready while the tests are built.
tests/services.sh start "$dir"
say 'building (the first time takes minutes)'
run "${runner[@]}" "$quiet" --no-run
run tests/services.sh wait "$dir"
eval "$(tests/services.sh env "$dir")"
say "servers are ready; a failed run keeps their logs in ${dir#"$root"/}"

doc_status=0
if (($# == 0)); then
  run cargo test --quiet --doc || doc_status=$?
fi
run "${runner[@]}" --no-fail-fast "$@"
((doc_status == 0)) || die 'the doc tests failed, see further up'
