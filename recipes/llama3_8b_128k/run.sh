#!/usr/bin/env bash
# LLaMA-3-8B to 128K. Needs 8 CUDA GPUs, the checkpoint, and a corpus; the arguments override the training configuration.
#
#   CORPUS=corpus.jsonl.zst bash recipes/llama3_8b_128k/run.sh logging=wandb
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
recipe=recipes/llama3_8b_128k
export PATH="$PWD/.venv/bin:$PATH"

anchorctx prepare --recipe "$recipe/recipe_prepare.yaml" "sources=[{path: ${CORPUS:?set CORPUS to your corpus file}}]"
torchrun --nproc_per_node "${GPUS:-8}" -m anchorctx.cli.train --recipe "$recipe/recipe_train.yaml" "$@"
anchorctx export run=runs/llama3_8b_128k out_dir=runs/llama3_8b_128k/exported dtype=bfloat16
