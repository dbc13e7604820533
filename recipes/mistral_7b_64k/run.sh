#!/usr/bin/env bash
# Mistral-7B to 64K. Needs 8 CUDA GPUs, the checkpoint, and a corpus; the arguments override the training configuration.
#
#   CORPUS=corpus.jsonl.zst bash recipes/mistral_7b_64k/run.sh logging=wandb
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
recipe=recipes/mistral_7b_64k
export PATH="$PWD/.venv/bin:$PATH"

anchorctx prepare --recipe "$recipe/recipe_prepare.yaml" "sources=[{path: ${CORPUS:?set CORPUS to your corpus file}}]"
torchrun --nproc_per_node "${GPUS:-8}" -m anchorctx.cli.train --recipe "$recipe/recipe_train.yaml" "$@"
anchorctx export run=runs/mistral_7b_64k out_dir=runs/mistral_7b_64k/exported dtype=bfloat16
