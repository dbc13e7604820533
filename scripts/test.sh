#!/usr/bin/env bash
# Sets everything up (once) and runs the tests: `bash scripts/test.sh`, from any directory.
# Arguments go to pytest, for example: bash scripts/test.sh tests/unit -k layout; --slow adds the long ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m pytest "$@"
