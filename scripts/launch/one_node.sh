#!/usr/bin/env bash
# Training on the GPUs of one machine, through torchrun.
#
#   bash scripts/launch/one_node.sh --recipe llama3_8b_128k [key=value ...]
#
#   GPUS=8        processes, one a GPU
#   DRY_RUN=1     print the command and stop
# What follows goes to `anchorctx train`. Exit code: 2 after a mistake, 1 where a process failed, 3 where one does
# not answer any more; 143, 130, 138 or 129 when told to end by SIGTERM, SIGINT, SIGUSR1 or SIGHUP, 124 after max_hours.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/environment.sh"
launch "$PYTHON" -m anchorctx.cli.torchrun --standalone --nproc_per_node "${GPUS:-8}" -m anchorctx train "$@"
