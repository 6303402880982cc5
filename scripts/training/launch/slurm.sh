#!/bin/bash
# One node of eight GPUs under Slurm; with more nodes, one launcher on each:
#
#     sbatch scripts/training/launch/slurm.sh scripts/training/recipes/da-drivelm.yaml --model MiniInternVL-2B --resume
#
#SBATCH --job-name=minimonkey
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
set -euo pipefail
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8
srun bash -c 'accelerate launch --config_file scripts/training/launch/zero1.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((8 * SLURM_NNODES))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$0" --main_process_port 29500 scripts/finetune.py "$@"' "$HEAD_NODE" "$@"
