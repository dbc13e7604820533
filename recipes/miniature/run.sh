#!/usr/bin/env bash
# Both papers' claims in miniature: base models, continued training by pattern and numerics, evaluation, reuse of KV
# caches; on two CPU cores with no network. Over two hours; SCALE=ci takes some three minutes: does the chain work?
#
#   bash recipes/miniature/run.sh
#   SCALE=ci bash recipes/miniature/run.sh
#   OUT=runs/elsewhere bash recipes/miniature/run.sh     # from the repository's root, wherever one stands
#
# It can be stopped and started at any time: stages whose result is there are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD/recipes${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
case ${SCALE:-full} in
full) recipe=recipe.yaml out=${OUT:-runs/miniature} ;;
ci) recipe=recipe_ci.yaml out=${OUT:-runs/miniature_ci} ;;
*) echo "SCALE=$SCALE is none: use full or ci" >&2 && exit 2 ;;
esac
python recipes/miniature/run.py "recipes/miniature/$recipe" "$out" "$@"
case " $* " in *" --list "* | *" --help "* | *" -h "*) exit ;; esac
python recipes/miniature/summary.py "recipes/miniature/$recipe" "$out"
