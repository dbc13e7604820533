#!/usr/bin/env bash
# Sets everything up (once) and runs the tests, two at a time: `bash scripts/test.sh`, from any directory.
# Arguments go to pytest, for example: bash scripts/test.sh tests/unit -k layout; --slow adds the long ones, -n 0 runs
# one test after the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two processes that think they have all cores are slower than one
export PYTHONHASHSEED="${PYTHONHASHSEED:-0}" # both must collect the same tests, in the same order
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
