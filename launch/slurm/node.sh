#!/bin/bash
# What one srun task does on its node: start this node's processes. $SLURM_NODEID is read here, on the node itself;
# in the batch script it would be node 0's, and every node would believe to be the first.
set -euo pipefail
. launch/env.sh

# If python is not on the PATH that srun passes on, make it so here. One of:
#   . /path/to/.venv/bin/activate
#   eval "$(conda shell.bash hook)" && conda activate rwkv
#   module load cuda python
# In a container: put `apptainer exec --nv --bind "$PWD" image.sif` in front of python below, or with pyxis give
#   SRUN_OPTIONS="--container-image=image.sqsh --container-mounts=$PWD --container-workdir=$PWD" to sbatch.

set_environment "$SLURM_NNODES" "$MAIN_ADDRESS" "$PROCESSES_PER_NODE" "${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
exec python -m rwkv_accel.launch --config_file "$ACCELERATE_CONFIG" \
  --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * PROCESSES_PER_NODE)) \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" \
  -m "${ENTRY_POINT:-rwkv_accel.train}" "$@"
