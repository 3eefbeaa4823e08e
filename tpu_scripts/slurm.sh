#!/usr/bin/env bash
#SBATCH --job-name=omni
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# A run on a Slurm cluster, one process for each GPU, which goes on by itself after it was interrupted:
#
#   sbatch --job-name=first --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --time=24:00:00 \
#     tpu_scripts/slurm.sh omni train experiments/mine.py --output /shared/runs/first
#
# 300 seconds before its time is over, and when it is preempted, the processes get TERM: they save, end with 75, and
# the job waits in the queue again. So it does when it fails, OMNI_RESTARTS times at most (default: 20); never after
# wrong usage (2). OMNI_DRY_RUN=1 prints the commands.
set -euo pipefail

if [ "$#" = 0 ]; then
  echo "slurm.sh: no command; give one, as in: sbatch slurm.sh omni train experiments/mine.py" >&2
  exit 2
fi

run() {
  if [ -n "${OMNI_DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

export OMNI_DISTRIBUTED=1 # jax finds the coordinator and each process's number in Slurm's variables
echo "== $(date -u +%FT%TZ) start ${SLURM_RESTART_COUNT:-0}: $*" >&2
code=0
# Without --kill-on-bad-exit: it would kill those that still write the checkpoint for which the others have ended.
run srun --export=ALL "$@" || code=$?

case $code in
  0) exit 0 ;;
  2)
    echo "slurm.sh: the command is used wrongly; it is not started again" >&2
    exit 2
    ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${OMNI_RESTARTS:-20}" ]; then
  echo "slurm.sh: ended with $code after ${SLURM_RESTART_COUNT} restarts; giving up" >&2
  exit "$code"
fi
echo "slurm.sh: ended with $code; back into the queue" >&2
run scontrol requeue "$SLURM_JOB_ID"
