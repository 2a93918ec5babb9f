#!/bin/bash
# Trains on several machines without a scheduler. The machines share the folder of this repository and out_dir.
#
# On every machine, the first one with NODE_RANK=0:
#   NUM_NODES=2 MAIN_IP=10.0.0.1 NODE_RANK=0 PROCESSES_PER_NODE=8 launch/multi_node.sh launch/recipes/lora_7b.yaml
# Or from one machine over ssh, with one host per line (`node1` or `node1 slots=8`):
#   HOSTFILE=hosts launch/multi_node.sh launch/recipes/lora_7b.yaml peft.rank=64
#
# When a machine fails, the others start again from the last checkpoint: with it once it is back (run the same command
# there), or without it if MIN_NODES allows. Machine 0 hosts the rendezvous: without it the run ends.
#   MIN_NODES=N          go on with as few machines as this (default: all)
#   MAX_RESTARTS=3       restarts after failures
#   MAIN_PORT=29500      the port of machine 0, open to the others
#   ACCELERATE_CONFIG    file of accelerate_configs/ (default: multinode_ddp.yaml)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/env.sh

fail() {
  echo "error: $*" >&2
  exit 2
}

[ $# -gt 0 ] || fail "no recipe; example: launch/multi_node.sh launch/recipes/demo.yaml"

run_here() {
  local name
  for name in NUM_NODES MAIN_IP NODE_RANK; do
    [ -n "${!name:-}" ] || fail "$name is not set; on each machine: NUM_NODES=2 MAIN_IP=<address of machine 0>" \
      "NODE_RANK=<0, 1 ..> $0 $1; or from one machine over ssh: HOSTFILE=<file with one host per line> $0 $1"
  done
  local processes=${PROCESSES_PER_NODE:-1}
  set_environment "$NUM_NODES" "$MAIN_IP" "$processes" "$(nproc)"
  exec python -m rwkv_accel.launch --min_machines "${MIN_NODES:-$NUM_NODES}" \
    --config_file "${ACCELERATE_CONFIG:-accelerate_configs/multinode_ddp.yaml}" \
    --num_machines "$NUM_NODES" --num_processes $((NUM_NODES * processes)) --machine_rank "$NODE_RANK" \
    --main_process_ip "$MAIN_IP" --main_process_port "${MAIN_PORT:-29500}" \
    --rdzv_backend c10d --max_restarts "${MAX_RESTARTS:-3}" \
    -m "${ENTRY_POINT:-rwkv_accel.train}" "$@"
}

# quoted NAME...: `NAME=value` words for another shell, of the variables that are set
quoted() {
  local name
  for name in "$@"; do
    if [ -n "${!name:-}" ]; then printf '%s=%q ' "$name" "${!name}"; fi
  done
}

run_over_ssh() {
  [ -r "$HOSTFILE" ] || fail "HOSTFILE $HOSTFILE cannot be read"
  local hosts=() slots=() host rest
  while read -r host rest; do
    case $host in '' | '#'*) continue ;; esac
    hosts+=("$host")
    case $rest in *slots=*) slots+=("${rest##*slots=}") ;; *) slots+=("${PROCESSES_PER_NODE:-1}") ;; esac
  done <"$HOSTFILE"
  [ ${#hosts[@]} -gt 0 ] || fail "HOSTFILE $HOSTFILE names no host"
  [ "$(printf '%s\n' "${slots[@]}" | sort -u | wc -l)" = 1 ] ||
    fail "HOSTFILE $HOSTFILE gives different slots; every machine needs the same number of processes"

  local words pids=() rank
  words=$(printf '%q ' "$@")
  for rank in "${!hosts[@]}"; do
    local settings
    settings=$(
      NUM_NODES=${#hosts[@]} MAIN_IP=${MAIN_IP:-${hosts[0]}} NODE_RANK=$rank PROCESSES_PER_NODE=${slots[rank]} \
        quoted NUM_NODES MAIN_IP NODE_RANK PROCESSES_PER_NODE MAIN_PORT MIN_NODES MAX_RESTARTS ACCELERATE_CONFIG \
        ENTRY_POINT PATH OMP_NUM_THREADS PYTHONPATH
    )
    # -tt: when this end goes away, the other end hears of it (SIGHUP), saves and stops.
    # shellcheck disable=SC2029  # expanded here on purpose
    ssh -tt -o BatchMode=yes "${hosts[rank]}" "cd $(printf %q "$PWD") && $settings launch/multi_node.sh $words" \
      </dev/null > >(sed -u "s/^/${hosts[rank]}: /") 2>&1 &
    pids+=($!)
  done
  trap 'kill "${pids[@]}" 2>/dev/null' INT TERM
  local code=0 pid
  for pid in "${pids[@]}"; do
    wait "$pid" || code=$?
  done
  exit "$code"
}

if [ -n "${HOSTFILE:-}" ] && [ -z "${NODE_RANK:-}" ]; then run_over_ssh "$@"; else run_here "$@"; fi
