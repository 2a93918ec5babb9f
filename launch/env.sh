# shellcheck shell=bash
# Environment of the processes on every node, sourced by launch/slurm/node.sh and launch/multi_node.sh.
# What is set already stays; each setting says why it is there. InfiniBand is left to NCCL, which finds it by itself.

# choose_interface ADDRESS: the interface on the network that the nodes share, by the route to node 0.
choose_interface() {
  local address
  address=$(getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }')
  if [ -z "$address" ] || ! command -v ip >/dev/null; then return; fi
  # On node 0 itself the route leads over the loopback: take the interface that carries the address.
  local own
  own=$(ip -o -4 addr show to "$address" | awk 'NR == 1 { print $2 }')
  if [ -n "$own" ]; then echo "$own"; else ip -o -4 route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p'; fi
}

# set_environment NUM_NODES MAIN_ADDRESS PROCESSES_PER_NODE CPUS_PER_NODE
set_environment() {
  local interface=
  if [ "$1" -gt 1 ]; then interface=$(choose_interface "$2"); fi
  if [ -n "$interface" ]; then
    # Gloo takes the address that the host name resolves to, on Debian often 127.0.1.1: the other nodes wait for ever.
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    # NCCL takes the first interface it finds, perhaps docker0, for its start-up (and for data without InfiniBand).
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
  fi
  # NCCL's reason for a failed connection belongs into the job's log; the default is silence.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # Workers that start again must not read the connection keys of those that died.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
  # After SIGTERM the trainer finishes its micro-batch and writes a checkpoint; the default of 30 s is short for that.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
  # torchrun gives each process one thread; divide the granted CPUs among the processes instead.
  local threads=$(($4 / $3))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  # Lines reach the log before a kill.
  export PYTHONUNBUFFERED=1
  if ! command -v python >/dev/null; then
    echo "error: $(hostname) has no python on its PATH: activate the environment before the start, or for Slurm in launch/slurm/node.sh" >&2
    return 2
  fi
}
