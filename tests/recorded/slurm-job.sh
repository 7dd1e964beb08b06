#!/bin/bash
#SBATCH --job-name=trialyard
#SBATCH --array=1-8
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@90
#SBATCH --partition=gpu
#SBATCH --cpus-per-task=4
#SBATCH --constraint='a100|h100'
# At TERM the worker ends its running batches, writes checkpoints and puts its trials back into the queue.
# Slurm sends TERM before the time limit, at preemption, `scontrol requeue` and `scancel`; where it uses
# control groups, to this process alone. So the worker takes its place.
exec PYTHON -P -m trialyard work digits mine --per-device 2
