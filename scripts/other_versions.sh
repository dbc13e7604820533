#!/usr/bin/env bash
# Runs the numerics and evaluation tests with other versions of torch and transformers than constraints.txt pins.
#
#   bash scripts/other_versions.sh ENVIRONMENT transformers==5.17.0 [torch==2.13.0 ...] [-- pytest's arguments]
#
# ENVIRONMENT is a folder that is made, or used again as it is. All other packages are those of constraints.txt, but for
# those that follow torch and transformers. Half an hour on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ $# -lt 2 ]; then
    sed -n '2,7p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
environment=$1
shift
wanted=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    wanted+=("$1")
    shift
done
[ $# -eq 0 ] || shift

if [ ! -x "$environment/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    constraints=$(mktemp)
    grep -vE '^(torch|triton|transformers|tokenizers|huggingface_hub|numpy|setuptools)==' constraints.txt >"$constraints"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[zstd,eval]' \
        pytest hypothesis psutil "${wanted[@]}" --constraint "$constraints"
    rm "$constraints"
fi
"$environment/bin/python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
"$environment/bin/python" -m pytest -q tests/numerics tests/unit/attention tests/unit/evals "$@"
