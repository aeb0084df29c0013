#!/usr/bin/env bash
# A private RabbitMQ node on free loopback ports, everything it writes under DIR. User guest, password guest.
#
#   rabbitmq.sh start DIR    starts it and returns at once; DIR/pid is the broker's process, DIR/ports its ports
#   rabbitmq.sh wait DIR     until it serves AMQP and the management API
#   rabbitmq.sh kill DIR     SIGKILL to the broker; `start` brings it back with its data on the same ports
#   rabbitmq.sh stop DIR     the same to all that was started. An orderly shutdown (it tells its clients) is
#                            SIGTERM to DIR/pid; that takes RabbitMQ 6 s, too long for the end of every test run
#   rabbitmq.sh env DIR      export lines for the tests
#   rabbitmq.sh sbin         the folder of the installed RabbitMQ's scripts; fails if there is none
#   rabbitmq.sh ctl DIR ...  rabbitmqctl; it costs seconds a call, the management API milliseconds
#
# A node of a cluster (cluster.sh) has a file DIR/member with its NODE, and with EPMD and EPMD_DIR, port and folder of the
# epmd that all nodes share; `stop` leaves that to cluster.sh.
#
# Before `start`: lines in DIR/extra.conf are added to rabbitmq.conf, with @TLS@ for port TLS of DIR/ports, which is kept
# free for a TLS listener; names in RABBITMQ_PLUGINS (comma-separated) are added to the plugins.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck disable=SC2154 # AMQP, MANAGEMENT, … come from DIR/ports

command=${1:-}
if [[ $command != sbin ]]; then
  [[ $# -ge 2 ]] || die 'usage: rabbitmq.sh start|wait|stop|kill|env|ctl DIR'
  dir=$(realpath -m "$2")
  shift 2
fi

# The scripts of the release itself: Debian's wrappers in /usr/sbin want to be root or rabbitmq, and switch user.
find_sbin() {
  local sbin=${ANGLER_TEST_RABBITMQ_SBIN:-}
  [[ $sbin ]] || sbin=$(printf '%s\n' /usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin | tail -n 1)
  [[ -x $sbin/rabbitmq-server ]] || die 'RabbitMQ is missing (Debian: apt-get install --no-install-recommends rabbitmq-server)'
  echo "$sbin"
}

# A RabbitMQ of rabbitmq4.sh brings its Erlang.
use_its_erlang() {
  [[ ! -d $sbin/../erlang ]] || export PATH=$sbin/../erlang:$PATH
}

# What the broker and rabbitmqctl read. Nothing of a system-wide RabbitMQ (/etc/rabbitmq, /var/lib/rabbitmq) is used.
load_environment() {
  [[ -s $dir/ports ]] || die "$dir was never started"
  NODE=angler EPMD_DIR=$dir
  # shellcheck disable=SC1091
  . "$dir/ports"
  # shellcheck disable=SC1091
  [[ ! -f $dir/member ]] || . "$dir/member"
  # The cookie is in HOME.
  export HOME="$dir/home"
  # Own epmd, own port: node names need be unique only there, and ending this epmd disturbs nobody.
  export ERL_EPMD_PORT=$EPMD ERL_EPMD_ADDRESS=127.0.0.1
  export RABBITMQ_NODENAME=$NODE@localhost RABBITMQ_DIST_PORT=$DIST
  export RABBITMQ_CTL_DIST_PORT_MIN=$CTL RABBITMQ_CTL_DIST_PORT_MAX=$((CTL + 4))
  export RABBITMQ_MNESIA_BASE="$dir/mnesia" RABBITMQ_SCHEMA_DIR="$dir/schema"
  export RABBITMQ_LOG_BASE="$dir/log" RABBITMQ_LOGS="$dir/log/rabbit.log"
  export RABBITMQ_CONFIG_FILE="$dir/rabbitmq" RABBITMQ_ADVANCED_CONFIG_FILE="$dir/advanced.config"
  export RABBITMQ_ENABLED_PLUGINS_FILE="$dir/enabled_plugins"
  export RABBITMQ_CONF_ENV_FILE="$dir/none.conf" # else /etc/rabbitmq/rabbitmq-env.conf is sourced
  export ERL_CRASH_DUMP_SECONDS=0                # no crash dumps: a killed broker is the test's aim
}

configure() {
  mkdir -p "$dir"/{home,mnesia,log,schema}
  pick_ports "$dir/ports" AMQP MANAGEMENT TLS EPMD DIST CTL CTL_2 CTL_3 CTL_4 CTL_5
  load_environment
  if [[ ! -f $HOME/.erlang.cookie ]]; then
    tr -dc A-Za-z0-9 < <(head -c 200 /dev/urandom) >"$HOME/.erlang.cookie"
    chmod 400 "$HOME/.erlang.cookie" # Erlang refuses one that others can read
  fi
  echo "[rabbitmq_management${RABBITMQ_PLUGINS:+,$RABBITMQ_PLUGINS}]." >"$dir/enabled_plugins"
  {
    echo "listeners.tcp.1 = 127.0.0.1:$AMQP"
    echo "management.tcp.ip = 127.0.0.1"
    echo "management.tcp.port = $MANAGEMENT"
    # The management API's counters are 5 s old otherwise, and tests poll them.
    echo "collect_statistics_interval = 500"
    echo "log.console = false"
    [[ ! -f $dir/extra.conf ]] || sed "s/@TLS@/$TLS/g" "$dir/extra.conf"
  } >"$dir/rabbitmq.conf"
  # The same for the message counts of quorum queues, and for how often consumer_timeout is checked (every minute by
  # default). rabbitmq.conf has no keys for these.
  echo '[{rabbit, [{quorum_tick_interval, 500}, {channel_tick_interval, 1000}]}].' >"$dir/advanced.config"
}

start_epmd() {
  pid_of "$EPMD_DIR" epmd.pid >/dev/null && return
  # Without ours the broker would start one that forks away and outlives it; so ours has to be up first.
  (
    cd "$EPMD_DIR"
    setsid epmd -port "$EPMD" -address 127.0.0.1 </dev/null >>"$dir/log/epmd.log" 2>&1 &
    echo $! >epmd.pid
  )
  local tries=200
  until listens "$EPMD"; do
    ((tries-- > 0)) || die "epmd does not answer; see $dir/log/epmd.log"
    sleep 0.02
  done
}

start_broker() {
  # RUNNING_UNDER_SYSTEMD makes the shell script exec the Erlang VM, so that our child is the broker itself and SIGKILL
  # means it. setsid: Ctrl-C in the terminal is for the test run, which then stops the broker. It is in DIR from its first
  # moment: whoever asks whether it lives looks for that.
  (
    cd "$dir"
    export RUNNING_UNDER_SYSTEMD=true
    export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}'
    setsid "$sbin/rabbitmq-server" </dev/null >>log/console.log 2>&1 &
    echo $! >pid
  )
}

# AMQP opens late in the boot, the management API is a plugin of its own: both have to answer.
serves() {
  listens "$AMQP" && [[ $(get "$MANAGEMENT" /api/overview 'Authorization: Basic Z3Vlc3Q6Z3Vlc3Q=') == HTTP/1.?' 200'* ]]
}

case $command in
start)
  sbin=$(find_sbin)
  use_its_erlang
  pid_of "$dir" pid >/dev/null && exit 0
  configure
  start_epmd
  start_broker
  ;;
wait)
  load_environment
  wait_for "$dir" serves
  ;;
kill) kill_and_wait "$dir" pid ;;
stop)
  kill_and_wait "$dir" pid # its helper processes (erl_child_setup, inet_gethost) end with it
  kill_and_wait "$dir" epmd.pid
  ;;
env)
  load_environment
  echo "export ANGLER_TEST_AMQP_URL=amqp://guest:guest@127.0.0.1:$AMQP/%2f"
  echo "export ANGLER_TEST_AMQP_MANAGEMENT=http://127.0.0.1:$MANAGEMENT"
  printf 'export ANGLER_TEST_RABBITMQ_SBIN=%q\n' "$(find_sbin)"
  ;;
sbin) find_sbin ;;
ctl)
  sbin=$(find_sbin)
  use_its_erlang
  load_environment
  exec "$sbin/rabbitmqctl" "$@"
  ;;
*) die "unknown command: $command" ;;
esac
