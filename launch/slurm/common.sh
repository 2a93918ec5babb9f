# shellcheck shell=bash
# The parts that the job scripts share, sourced by them in the submit directory (the root of the repository).

# Processes per node: what the user said, else one per granted GPU, else one (a cluster without GPUs).
granted_processes() {
  local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-1}}
  echo "${PROCESSES_PER_NODE:-${gpus##*:}}" # SLURM_GPUS_PER_NODE may read a100:8
}

note() { echo "[job ${SLURM_JOB_ID} $(date +%T)] $*"; }

# train RECIPE [key.sub=value ...]: one srun task per node; sets exit_code. A signal to this script (before the time
# limit, or a pre-emption) asks the trainer through a file to save and stop: signals to the launchers would race.
train() {
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: submit with sbatch; to see what would run: python -m rwkv_accel.launch_plan $0 $*"
    exit 2
  fi
  if [ $# -eq 0 ]; then
    echo "error: no recipe; example: sbatch $0 launch/recipes/demo.yaml"
    exit 2
  fi
  MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # Two jobs on one node do not meet, nor the ports from 32768 that Linux gives to outgoing connections.
  MAIN_PORT=$((20000 + SLURM_JOB_ID % 12000))
  PROCESSES_PER_NODE=$(granted_processes)
  job_files=${JOB_FILES:-$PWD/slurm-files/$SLURM_JOB_ID}
  export MAIN_ADDRESS MAIN_PORT PROCESSES_PER_NODE ACCELERATE_CONFIG
  export RWKV_ACCEL_STOP_FILE=$job_files/stop RWKV_ACCEL_REQUEUE_FILE=$job_files/requeue
  export RWKV_ACCEL_STARTED_FILE=$job_files/started
  mkdir -p "$job_files"
  rm -f "$RWKV_ACCEL_STOP_FILE" "$RWKV_ACCEL_REQUEUE_FILE" "$RWKV_ACCEL_STARTED_FILE"
  stop_requested=
  trap 'ask_to_stop USR1' USR1
  trap 'ask_to_stop TERM' TERM

  note "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) x $PROCESSES_PER_NODE processes, restart ${SLURM_RESTART_COUNT:-0}, node 0 is $MAIN_ADDRESS:$MAIN_PORT: $*"
  # Since 22.05 srun does not take --cpus-per-task over from sbatch; after `sbatch --export=NONE` it passes nothing on.
  # shellcheck disable=SC2086  # SRUN_OPTIONS is a list of words
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    --kill-on-bad-exit=1 --export=ALL --label ${SRUN_OPTIONS:-} bash launch/slurm/node.sh "$@" &
  local srun_pid=$!
  exit_code=0
  # A trapped signal ends `wait` early: go on until srun is gone.
  while kill -0 "$srun_pid" 2>/dev/null; do
    wait "$srun_pid"
    exit_code=$?
  done
  note "srun ended with $exit_code"
  if finished; then rm -rf "$job_files"; fi
}

finished() { [ "$exit_code" = 0 ] && [ ! -e "$RWKV_ACCEL_REQUEUE_FILE" ]; }

ask_to_stop() {
  note "$1: asking the trainer to save and stop"
  stop_requested=$1
  touch "$RWKV_ACCEL_STOP_FILE"
}

# Whether what becomes of the job is up to this script. While Slurm itself ends the job it is COMPLETING: cancelled jobs
# must stay so, and those of a lost node or of `scontrol requeue` are queued again by Slurm. A time limit is ours.
up_to_us() {
  case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r') in
    RUNNING* | COMPLETING*TimeLimit) return 0 ;;
    *) return 1 ;;
  esac
}

# requeue_if_worthwhile: whether and why the job is queued again.
#   saved by request (limit, pre-emption)      again; the counter of failures starts anew
#   asked to stop before the first update      again, at most MAX_FAILURES times in a row
#   failed after the first update of this try  again, at most MAX_FAILURES times in a row (lost node, broken network)
#   failed before it                           never: a wrong recipe, missing data or memory would fail again
# MAX_RESTARTS bounds all of it.
requeue_if_worthwhile() {
  local failures restarts=${SLURM_RESTART_COUNT:-0}
  failures=$(cat "$job_files/failures" 2>/dev/null || echo 0)
  if finished; then return; fi
  if ! up_to_us; then
    note "Slurm ends this job: not queued again from here"
    return
  fi
  if [ "$restarts" -ge "${MAX_RESTARTS:-100}" ]; then
    note "not queued again: $restarts restarts are the limit (MAX_RESTARTS)"
    return
  fi
  if [ -e "$RWKV_ACCEL_REQUEUE_FILE" ] && [ -e "$RWKV_ACCEL_STARTED_FILE" ]; then
    note "saved at step $(cat "$RWKV_ACCEL_REQUEUE_FILE"), queued again"
    failures=0
  elif [ -n "$stop_requested" ] || [ -e "$RWKV_ACCEL_REQUEUE_FILE" ] || [ -e "$RWKV_ACCEL_STARTED_FILE" ]; then
    failures=$((failures + 1))
    if [ "$failures" -gt "${MAX_FAILURES:-3}" ]; then
      note "not queued again: failed ${MAX_FAILURES:-3} times in a row (MAX_FAILURES)"
      return
    fi
    note "failed or stopped without progress ($failures in a row), queued again"
  else
    note "not queued again: it failed before the first update; the reason is above"
    return
  fi
  echo "$failures" >"$job_files/failures"
  trap 'exit 0' TERM # the requeue ends this script
  scontrol requeue "$SLURM_JOB_ID"
  sleep "${REQUEUE_WAIT_SECONDS:-60}" &
  wait
}
