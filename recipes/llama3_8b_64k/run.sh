#!/usr/bin/env bash
# LLaMA-3-8B to 64K, on 8 GPUs of 80 GB. What it does and takes: recipes/continue_training.sh
#
#   CORPUS=books.jsonl.zst HELD_OUT=held_out.jsonl bash recipes/llama3_8b_64k/run.sh logging=wandb
exec bash "$(dirname "${BASH_SOURCE[0]}")/../continue_training.sh" llama3_8b_64k "$@"
