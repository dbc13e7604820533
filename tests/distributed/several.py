"""Several training commands in one process, one after the other: starting a process costs more than a small run.

    torchrun ... several.py '[["out_dir=a", ...], ["out_dir=b", ...]]'

Rank 0 writes each command's exit code and stderr as a JSON line to stdout.
"""

import contextlib
import io
import json
import os
import sys

from anchorctx.cli import main as cli
from anchorctx.parallel import dist

dist.stop = lambda: None  # DeepSpeed joins a process group once in a process's life
cli.PATIENCE_S = 0.0

for overrides in json.loads(sys.argv[1]):
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = cli.main(["train", *overrides])
    if os.environ["RANK"] == "0":
        print(json.dumps({"code": code, "stderr": stderr.getvalue()}), flush=True)
