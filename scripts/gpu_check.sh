#!/usr/bin/env bash
# Every attention backend that works on this machine's GPU, against a float64 reference: one table of errors and times.
#   bash scripts/gpu_check.sh [--out benchmarks/gpu_check.json] [--tokens 16384] [--document 1024] ...
# Uses $PYTHON, else the project's .venv, else python3; installs nothing.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON="$root/.venv/bin/python"
  [[ -x "$PYTHON" ]] || PYTHON="$(command -v python3 || command -v python)"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$root/scripts/gpu_check.py" "$@"
