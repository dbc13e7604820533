#!/usr/bin/env bash
# Training under SLURM: submits a job whose every node runs several_nodes.sh.
#
#   NODES=4 bash scripts/launch/slurm.sh --recipe llama3_8b_128k [key=value ...]
#
#   NODES=1       nodes                          PARTITION, ACCOUNT   as your cluster wants them
#   GPUS=8        GPUs of a node                 TIME=24:00:00        longest time
#   CPUS=64       CPU cores of a node            PORT=29500           change it where jobs share nodes
#   DRY_RUN=1     print the command that submits, and the job's own, and stop
#   GRACE=300     seconds before the end at which the run is told to finish its step, write a checkpoint and end;
#                 submitted again, it goes on from there
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/environment.sh"
options=(--job-name anchorctx --nodes "${NODES:-1}" --ntasks-per-node 1 --gpus-per-node "${GPUS:-8}"
    --cpus-per-task "${CPUS:-64}" --time "${TIME:-24:00:00}" --signal "TERM@${GRACE:-300}" --output "%x_%j.log")
[ -z "${PARTITION:-}" ] || options+=(--partition "$PARTITION")
[ -z "${ACCOUNT:-}" ] || options+=(--account "$ACCOUNT")
printf -v arguments ' %q' "$@"
job="export NODES=\$SLURM_NNODES GPUS=${GPUS:-8} JOB=anchorctx_\$SLURM_JOB_ID DRY_RUN=
export HEAD=\$(scontrol show hostnames \"\$SLURM_JOB_NODELIST\" | head -n 1):${PORT:-29500}
exec srun --kill-on-bad-exit=1 bash ${here@Q}/several_nodes.sh$arguments"
if [ -n "${DRY_RUN:-}" ]; then
    printf '%s\n' "${options[*]@Q}" | sed 's/^/sbatch /'
    printf '%s\n' "$job"
    exit 0
fi
printf '#!/usr/bin/env bash\n%s\n' "$job" | launch sbatch "${options[@]}"
