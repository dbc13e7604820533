#!/usr/bin/env bash
# A recipe of this folder from start to end: corpus -> packed rows -> training -> Hugging Face folder -> held-out perplexity.
#
#   CORPUS=books.jsonl.zst HELD_OUT=held_out.jsonl bash recipes/gpu/run.sh NAME [key=value ...]
#
#   NAME       a file beside this one, such as llama3_8b_128k
#   key=value  overrides of the training configuration, such as logging=wandb pattern=full
#   CORPUS     documents to train on: a file, folder or glob             (required)
#   HELD_OUT   documents to validate on, none of them in CORPUS          (required)
#   MODEL      the checkpoint: a folder, or a name on the hub            (the recipe's model.path)
#   OUT        folder for everything that is made                        (runs/NAME)
#   GPUS       processes on this machine                                 (8)
#   PREPARE    keys for anchorctx prepare, such as 'mixture=prolong_64k'
#
# Typed again, it goes on where it stopped: a packed set that exists is used, training resumes from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
name=${1:-} recipe=recipes/gpu/${1:-}.yaml
[ -f "$recipe" ] || {
    echo "recipes/gpu/run.sh: '$name' is no recipe: name one of $(cd recipes/gpu && echo *.yaml | sed 's/\.yaml//g')" >&2
    exit 2
}
shift
command -v anchorctx >/dev/null || export PATH="$PWD/.venv/bin:$PATH"  # your environment, with its CUDA, comes first

: "${CORPUS:?set CORPUS to the documents to train on, such as CORPUS=books.jsonl.zst}"
: "${HELD_OUT:?set HELD_OUT to documents that are not in CORPUS, such as HELD_OUT=held_out.jsonl}"
of_model() { sed -n "/^model:/,/^[^ ]/s/^  $1: *//p" "$recipe"; }
model=${MODEL:-$(of_model path)}
length=$(of_model max_length)
out=${OUT:-runs/$name}
read -ra prepare <<<"${PREPARE:-}"

pack() { # folder, documents, whose name may hold quotes
    anchorctx prepare out_dir="$out/$1" tokenizer="$model" row_length="$length" "sources=[{path: '${2//\'/\\\'}'}]" \
        "${prepare[@]}"
}
evaluate() { # folder, model, fields of its configuration
    [ -s "$out/eval/$1/results.jsonl" ] && return
    rm -rf "$out/eval/$1.partial"
    anchorctx eval model="$2" label="$1" config="$3" corpus.path="$HELD_OUT" corpus.format=auto \
        out_dir="$out/eval/$1.partial" perplexity.max_length="$length"
    mv "$out/eval/$1.partial" "$out/eval/$1"
}

pack packed "$CORPUS"
pack packed_validation "$HELD_OUT"
python -m anchorctx.cli.torchrun --standalone --nproc_per_node "${GPUS:-8}" -m anchorctx train \
    --recipe "$recipe" out_dir="$out/run" data.train="$out/packed" data.validation="$out/packed_validation" model.path="$model" "$@"
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
