# Sourced by rabbitmq.sh and seaweedfs.sh: ports, processes, readiness. Linux only (/proc, /dev/tcp of bash).
# shellcheck shell=bash

# die MESSAGE
die() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# pick_ports FILE NAME...: notes a free loopback port for each name in FILE, once; a restart keeps its ports.
# They are neighbours from a block of 16, so that two servers that start at the same moment either take quite different
# ports or see each other. They lie below the kernel's ephemeral range (32768 and up): no outgoing connection can take
# the port of a server that a test has just killed and is about to start again.
pick_ports() {
  local file=$1
  shift
  [[ -s $file ]] && return
  "${ANGLER_TEST_PYTHON:-python3}" - "$@" >"$file.new" <<'PYTHON' || die 'found no free ports (python3 is needed)'
import random, socket, sys

names = sys.argv[1:]
for _ in range(1000):
    first = random.randrange(10_000, 32_000, 16)
    sockets = [socket.socket() for _ in names]
    try:
        for offset, taken in enumerate(sockets):
            taken.bind(("127.0.0.1", first + offset))
    except OSError:
        continue
    for offset, name in enumerate(names):
        print(f"{name}={first + offset}")
    sys.exit()
sys.exit(1)
PYTHON
  mv "$file.new" "$file"
}

# pid_of DIR FILE: the process noted in DIR/FILE, if it lives and is ours. Ids are reused, and a signal to a stranger
# would be bad; every server here is started with DIR as its working folder, and that is what tells it apart.
pid_of() {
  local pid
  pid=$(cat "$1/$2" 2>/dev/null) || return 1
  [[ $(readlink "/proc/$pid/cwd") == "$1" ]] || return 1
  echo "$pid"
}

# kill_and_wait DIR FILE: SIGKILL, until the process is gone.
kill_and_wait() {
  local pid
  while pid=$(pid_of "$1" "$2"); do
    kill -KILL "$pid" 2>/dev/null || true
    sleep 0.02
  done
}

# get PORT PATH [HEADER]: the whole answer to a GET, so that readiness needs no curl.
get() (
  { exec 3<>"/dev/tcp/127.0.0.1/$1"; } 2>/dev/null || exit 1
  printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n%s\r\n' "$2" "${3:+$3$'\r\n'}" >&3
  timeout 5 cat <&3
)

# listens PORT
listens() {
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# wait_for DIR COMMAND...: until the command succeeds. Gives up, with the end of the logs in DIR/log, when the server is
# gone or after ANGLER_TEST_START_SECONDS.
wait_for() {
  local dir=$1 seconds=${ANGLER_TEST_START_SECONDS:-120} trouble=''
  shift
  local deadline=$((SECONDS + seconds))
  until "$@"; do
    if ! pid_of "$dir" pid >/dev/null; then
      trouble='ended while starting'
    elif ((SECONDS >= deadline)); then
      trouble="was not ready after $seconds s"
    fi
    if [[ $trouble ]]; then
      tail -n 25 "$dir"/log/*.log >&2 || true
      die "the server in $dir $trouble; above, the end of its logs"
    fi
    sleep 0.05
  done
}
