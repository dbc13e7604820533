#!/usr/bin/env bash
# Qwen2.5-1.5B to 64K, on 8 GPUs of 80 GB. What it does and takes: recipes/continue_training.sh
#
#   CORPUS=books.jsonl.zst HELD_OUT=held_out.jsonl bash recipes/qwen2.5_1.5b_64k/run.sh logging=wandb
exec bash "$(dirname "${BASH_SOURCE[0]}")/../continue_training.sh" qwen2.5_1.5b_64k "$@"
