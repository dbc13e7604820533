#!/usr/bin/env bash
# Makes .venv with the exact versions of constraints.txt and this package in it. Does nothing when nothing changed.
#
#   bash scripts/setup.sh            PYTHON=python3.12 picks another interpreter
#
# constraints.txt pins torch for the CPU. For a GPU: pip install -e '.[zstd,wandb]' in an environment of your own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$python" --version 2>&1) is too old, anchorctx needs Python >= 3.11: set PYTHON=python3.12 or another" >&2
    exit 1
}
stamp=.venv/.anchorctx-setup
wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
echo "setup: installing into .venv (a few minutes, once)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check torch --constraint constraints.txt
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
echo "$wanted" >"$stamp"
echo "setup: done"
