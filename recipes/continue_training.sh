#!/usr/bin/env bash
# What the recipes for GPUs share: corpus -> packed rows -> training -> Hugging Face folder -> held-out perplexity.
#
#   CORPUS=books.jsonl.zst HELD_OUT=held_out.jsonl bash recipes/RECIPE/run.sh [key=value ...]
#
#   CORPUS     documents to train on: a file, folder or glob                  (required)
#   HELD_OUT   documents to validate on, none of which are in CORPUS          (required)
#   MODEL      the checkpoint, a folder or a name on the hub                  (the recipe's)
#   OUT        folder for everything that is made                            (runs/RECIPE)
#   GPUS       processes on this machine                                     (8)
#   key=value  overrides of the training configuration, e.g. logging=wandb pattern=full
#
# Typed again it goes on where it ended: a packed set that exists is used, training resumes from its newest checkpoint.
set -euo pipefail
name=$1 && shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v anchorctx >/dev/null || export PATH="$PWD/.venv/bin:$PATH"  # your own environment, with its CUDA, wins

recipe=recipes/$name
: "${CORPUS:?set CORPUS to the documents to train on, such as CORPUS=books.jsonl.zst}"
: "${HELD_OUT:?set HELD_OUT to documents that are not in CORPUS, such as HELD_OUT=held_out.jsonl}"
setting() { sed -n "s/^$1: *//p" "$recipe/recipe_prepare.yaml"; }
model=${MODEL:-$(setting tokenizer)}
length=$(setting row_length)
out=${OUT:-runs/$name}

pack() { # folder, documents
    anchorctx prepare --recipe "$recipe/recipe_prepare.yaml" out_dir="$out/$1" tokenizer="$model" "sources=[{path: '$2'}]"
}
evaluate() { # folder, model, fields of its configuration
    [ -s "$out/eval/$1/results.jsonl" ] && return
    rm -rf "$out/eval/$1.partial"
    anchorctx eval model="$2" label="$1" config="$3" "corpus={path: '$HELD_OUT', format: auto}" out_dir="$out/eval/$1.partial" \
        perplexity.max_length="$length"
    mv "$out/eval/$1.partial" "$out/eval/$1"
}

pack packed "$CORPUS"
pack packed_validation "$HELD_OUT"
torchrun --standalone --nproc_per_node "${GPUS:-8}" -m anchorctx train --recipe "$recipe/recipe_train.yaml" out_dir="$out/run" \
    data.train="$out/packed" data.validation="$out/packed_validation" model.path="$model" "$@"
newest=$(basename "$(ls -d "$out"/run/checkpoints/step_* | tail -n 1)")
if [ "$(cat "$out/exported_step" 2>/dev/null)" != "$newest" ]; then # none yet, or training went on since
    rm -rf "$out/exported" "$out/eval" "$out/precision"
    anchorctx export run="$out/run" out_dir="$out/exported" dtype=bfloat16
    echo "$newest" >"$out/exported_step"
fi
mkdir -p "$out/eval"
evaluate before "$model" "{max_position_embeddings: $length}"
evaluate after "$out/exported" '{}'
anchorctx plot out_dir="$out/plots" run="$out/run" packed="$out/packed"
printf '\nheld-out perplexity, each folder loaded fresh:\n'
for at in before after; do
    printf '  %-8s' "$at" && python -c 'import json, sys; print(round(json.loads(open(sys.argv[1]).readline())["value"], 3))' \
        "$out/eval/$at/results.jsonl"
done
printf 'made: %s (the model), %s/plots\n' "$out/exported" "$out"
