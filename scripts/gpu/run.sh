#!/usr/bin/env bash
# Measures everything that this project says about GPUs, on one CUDA card, in nine minutes.
#   bash scripts/gpu/run.sh --out gpu_out [--model FOLDER] [--only check,step] [--total SECONDS]
#   bash scripts/gpu/run.sh --out gpu_out --tiny       every stage with tiny shapes on a CPU, to see that it works
# Uses $PYTHON, else the project's .venv, else python3; installs nothing.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON="$root/.venv/bin/python"
  [[ -x "$PYTHON" ]] || PYTHON="$(command -v python3 || command -v python)"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$root/scripts/gpu/run.py" "$@"
