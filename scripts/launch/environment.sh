# Sourced by the launchers: the interpreter, and settings of libraries that every process needs.
PYTHON=${PYTHON:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=$(command -v python3)
export PYTHON
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # long rows fragment memory without it
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a lost rank ends the job
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

launch() { # run the command, or under DRY_RUN print it
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "$@"
        printf '\n'
    else
        exec "$@"
    fi
}
