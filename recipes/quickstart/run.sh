#!/usr/bin/env bash
# The main job in miniature, on a CPU with no network: a model that knows 512 tokens learns to use 4,096.
#
#   bash recipes/quickstart/run.sh [key=value ...]     overrides of the training configuration, e.g. pattern=full
#   OUT=runs/other bash recipes/quickstart/run.sh      another folder (default: runs/quickstart)
#
# Steps whose result is there already are not repeated; remove the folder to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1

recipe=recipes/quickstart
out=${OUT:-runs/quickstart}
began=$SECONDS
mkdir -p "$out"

step() { printf '\n[%d/7, %ds] %s\n' "$1" $((SECONDS - began)) "$2"; }

step 1 "a byte-level BPE, and a small Llama that knows 512 tokens"
[ -d "$out/base" ] || python "$recipe/pretrain.py" "$out/base" --max-seconds 1800

step 2 "documents to packed rows of 4,096 tokens"
packed() {
    anchorctx prepare --recipe "$recipe/recipe_prepare.yaml" out_dir="$out/$1" tokenizer="$out/base" \
        "sources=[{format: stdlib, stdlib: {split: $2, facts: true}}]"
}
packed packed train
packed packed_validation validation

step 3 "training with AnchorAttention: DeepSpeed ZeRO-2, two processes"
OMP_NUM_THREADS=1 python -m anchorctx.cli.torchrun --standalone --nproc_per_node 2 -m anchorctx train \
    --recipe "$recipe/recipe_train.yaml" out_dir="$out/run" \
    data.train="$out/packed" data.validation="$out/packed_validation" model.path="$out/base" "$@"

step 4 "export to a Hugging Face folder"
newest=$(basename "$(ls -d "$out"/run/checkpoints/step_* | tail -n 1)")
if [ "$(cat "$out/exported_step" 2>/dev/null)" != "$newest" ]; then # none yet, or training went on since
    rm -rf "$out/exported" "$out/eval" "$out/precision"
    anchorctx export run="$out/run" out_dir="$out/exported"
    echo "$newest" >"$out/exported_step"
fi

in_list=${out//\'/\\\'} # between quotes, as in a list
step 5 "held-out perplexity and retrieval, before and after; needles by depth"
anchorctx eval out_dir="$out/eval" 'evals=[perplexity,retrieval,needle]' "models=[\
    {label: before, path: '$in_list/base', config: {max_position_embeddings: 4096}},\
    {label: 'before, theta raised', path: '$in_list/base', rope: {theta: 1.0e5}, max_length: 4096},\
    {label: after, path: '$in_list/exported'}]"

step 6 "does bfloat16 break RoPE on this model?"
anchorctx precision model="$out/exported" label=after out_dir="$out/precision" 'lengths=[512,4096]' \
    'shifts=[16,4096,131072]' cost=false

step 7 "pictures, and one page with everything"
anchorctx plot out_dir="$out/plots" run="$out/run" packed="$out/packed" pretraining_length=512 \
    "results=['$in_list/eval/results.jsonl']"
anchorctx report "$out" out="$out/report.html" pretraining_length=512

python "$recipe/summary.py" "$out" $((SECONDS - began))
