#!/usr/bin/env bash
# A private cluster of three RabbitMQ nodes on free loopback ports, everything they write under DIR. User guest,
# password guest. Each node is one of rabbitmq.sh, in DIR/n1 to DIR/n3.
#
#   cluster.sh start DIR            starts all and returns at once; DIR/ports has AMQP_1, MANAGEMENT_1, …
#   cluster.sh wait DIR             until each serves and sees the others
#   cluster.sh start|wait DIR N     the same of one node, which comes back with its data on the same ports
#   cluster.sh kill DIR N...        SIGKILL
#   cluster.sh signal DIR NAME N... STOP and CONT; TERM is an orderly shutdown, and is waited for
#   cluster.sh stop DIR             SIGKILL to all that was started
#   cluster.sh env DIR              export lines for the tests: all URLs, and the management API of the first node
#   cluster.sh ctl DIR N ...        rabbitmqctl
#
# Before `start`: lines in DIR/extra.conf are added to each node's rabbitmq.conf.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
rabbitmq=$(dirname "${BASH_SOURCE[0]}")/rabbitmq.sh
nodes=(1 2 3)

usage='usage: cluster.sh start|wait|kill|signal|stop|env|ctl DIR …'
[[ $# -ge 2 ]] || die "$usage"
command=$1
cluster=$(realpath -m "$2")
shift 2

configure() {
  local node other
  pick_ports "$cluster/epmd.port" EPMD
  for node in "${nodes[@]}"; do
    mkdir -p "$cluster/n$node/home"
    printf 'NODE=n%s\nEPMD_DIR=%q\n' "$node" "$cluster" >"$cluster/n$node/member"
    cat "$cluster/epmd.port" >>"$cluster/n$node/member"
    {
      echo 'cluster_formation.peer_discovery_backend = classic_config'
      echo "cluster_formation.target_cluster_size_hint = ${#nodes[@]}"
      for other in "${nodes[@]}"; do
        echo "cluster_formation.classic_config.nodes.$other = n$other@localhost"
      done
      [[ ! -f $cluster/extra.conf ]] || cat "$cluster/extra.conf"
    } >"$cluster/n$node/extra.conf"
  done
  # They know each other by one cookie: the first node's, which it makes when it is started.
  "$rabbitmq" start "$cluster/n1"
  for node in "${nodes[@]:1}"; do
    cp -p "$cluster/n1/home/.erlang.cookie" "$cluster/n$node/home/"
  done
}

# The ports of all, under names with the node's number.
note_ports() {
  local node
  for node in "${nodes[@]}"; do
    sed "s/=/_$node=/" "$cluster/n$node/ports"
  done >"$cluster/ports"
}

port() { sed -n "s/^$1=//p" "$cluster/ports"; }

# Whether node N sees all nodes.
sees_all() {
  local answer
  answer=$(get "$(port "MANAGEMENT_$1")" /api/nodes 'Authorization: Basic Z3Vlc3Q6Z3Vlc3Q=') || return 1
  [[ $(grep -o '"running":true' <<<"$answer" | wc -l) == "${#nodes[@]}" ]]
}

case $command in
start)
  if (($#)); then
    for node; do "$rabbitmq" start "$cluster/n$node"; done
  else
    configure
    for node in "${nodes[@]:1}"; do "$rabbitmq" start "$cluster/n$node"; done
    note_ports
  fi
  ;;
wait)
  if (($#)); then
    for node; do "$rabbitmq" wait "$cluster/n$node"; done
  else
    for node in "${nodes[@]}"; do "$rabbitmq" wait "$cluster/n$node"; done
    for node in "${nodes[@]}"; do
      wait_for "$cluster/n$node" sees_all "$node"
    done
  fi
  ;;
kill) for node; do kill_and_wait "$cluster/n$node" pid; done ;;
signal)
  name=$1
  shift
  for node; do
    pid=$(pid_of "$cluster/n$node" pid) || die "node $node does not run"
    kill "-$name" "$pid"
    [[ $name != TERM ]] || while pid_of "$cluster/n$node" pid >/dev/null; do sleep 0.05; done
  done
  ;;
stop)
  for node in "${nodes[@]}"; do "$rabbitmq" stop "$cluster/n$node"; done
  kill_and_wait "$cluster" epmd.pid
  ;;
env)
  urls=()
  for node in "${nodes[@]}"; do urls+=("amqp://guest:guest@127.0.0.1:$(port "AMQP_$node")/%2f"); done
  printf 'export ANGLER_TEST_AMQP_URL=%s,%s,%s\n' "${urls[@]}"
  echo "export ANGLER_TEST_AMQP_MANAGEMENT=http://127.0.0.1:$(port MANAGEMENT_1)"
  ;;
ctl)
  node=$1
  shift
  exec "$rabbitmq" ctl "$cluster/n$node" "$@"
  ;;
*) die "$usage" ;;
esac
