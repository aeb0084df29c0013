#!/usr/bin/env bash
# A RabbitMQ 4.x for the tests, under target/test-env/rabbitmq4, from the packages of a newer Debian. Nothing is
# installed on the system, no package script runs, root is not needed. About 70 MB to fetch, 200 MB on disk, a minute.
#
#   eval "$(tests/services/rabbitmq4.sh)"          fetches it once, sets ANGLER_TEST_RABBITMQ_SBIN: tests/run.sh,
#                                                  tests/soak.sh and tests/services.sh up then use it
#   eval "$(tests/services/rabbitmq4.sh trixie)"   the one of another suite; the default is forky, which has the newest
#
# Delete the suite's folder to fetch it again: a suite that is not released yet gets newer versions.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

suite=${1:-forky}
[[ $suite =~ ^[a-z]+$ ]] || die 'usage: rabbitmq4.sh [SUITE]'
mirror=${ANGLER_TEST_DEBIAN_MIRROR:-http://deb.debian.org/debian}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
test_env=$(realpath -m "${BASH_SOURCE[0]%/*}/../../target/test-env")
folder=$test_env/rabbitmq4/$suite
root=$folder/root

# An apt of its own, for which nothing is installed yet: it checks signatures and knows what depends on what.
configure_apt() {
  [[ -f $keyring ]] || die "$keyring is missing (Debian: apt-get install debian-archive-keyring)"
  mkdir -p "$folder"/apt/{lists,archives}/partial "$folder"/apt/preferences.d
  : >"$folder/apt/status"
  echo "deb [signed-by=$keyring] $mirror $suite main" >"$folder/apt/sources.list"
  # A mirror may be a snapshot, hence Check-Valid-Until. The sandbox's user could not write here.
  cat >"$folder/apt/apt.conf" <<CONF
Dir::State "$folder/apt";
Dir::State::status "$folder/apt/status";
Dir::Cache "$folder/apt";
Dir::Etc "$folder/apt";
Dir::Etc::sourcelist "sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::parts "/dev/null";
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
APT::Install-Recommends "false";
APT::Sandbox::User "";
CONF
  export APT_CONFIG=$folder/apt/apt.conf
}

# RabbitMQ, Erlang and the libraries; not what Debian's package scripts would need.
fetch_packages() {
  local packages
  apt-get -q update
  packages=$(apt-get -q --simulate install rabbitmq-server | awk '/^Inst/ {print $2}' |
    grep -E '^(rabbitmq-server|erlang-.*|lib.*|zlib1g)$')
  cd "$folder/apt/archives"
  # shellcheck disable=SC2086 # a list
  apt-get -q download $packages
  mkdir -p "$root"
  local package
  for package in *.deb; do dpkg-deb --extract "$package" "$root"; done
}

# Erlang's programs want a newer C library than the system's: each is started by the loader that came with it. Their
# children, such as a shell, get nothing of that.
wrap_programs() {
  local erlang=$root/usr/lib/erlang libraries loader program
  loader=$(find "$root" -name 'ld-linux-*.so.*' | head -n 1)
  libraries=$(find "$root" -name 'libc.so.6' -printf '%h\n' | head -n 1)
  [[ $loader && $libraries ]] || die "no C library in $root"
  # Its scripts know where Debian would have put them.
  grep -rlI /usr/lib/erlang "$erlang/bin" "$erlang"/erts-*/bin | xargs -r sed -i "s|/usr/lib/erlang|$erlang|g"
  find "$erlang" -type f -perm -u+x | while read -r program; do
    # An ELF program, and not a library: it names a loader.
    [[ $(head -c 4 "$program" | tail -c 3) == ELF ]] && grep -q /ld-linux "$program" || continue
    mv "$program" "$program.elf"
    printf '#!/bin/sh\nexec %q --library-path %q --argv0 "$0" %q "$@"\n' "$loader" "$libraries" "$program.elf" >"$program"
    chmod +x "$program"
  done
}

install() {
  rm -rf "$folder"
  mkdir -p "$folder"
  configure_apt
  fetch_packages
  wrap_programs
  local sbin
  sbin=$(printf '%s\n' "$root"/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin)
  ln -s "$root/usr/lib/erlang/bin" "${sbin%/sbin}/erlang" # rabbitmq.sh looks for it there
  rm -rf "$folder/apt"
  ln -s "$sbin" "$folder/sbin.new"
  mv -T "$folder/sbin.new" "$folder/sbin" # last: it says that the rest is there
}

mkdir -p "$test_env"
(
  flock 9
  [[ -x $folder/sbin/rabbitmq-server ]] && exit
  echo "tests: fetching the RabbitMQ of Debian $suite" >&2
  if ! (install) >"$test_env/rabbitmq4.log" 2>&1 9>&-; then
    tail -n 25 "$test_env/rabbitmq4.log" >&2
    die "that failed; above, the end of $test_env/rabbitmq4.log"
  fi
) 9>"$test_env/rabbitmq4.lock"
printf 'export ANGLER_TEST_RABBITMQ_SBIN=%q\n' "$(realpath "$folder/sbin")"
