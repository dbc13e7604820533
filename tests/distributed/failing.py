"""`anchorctx train` whose second process raises in its second step, while the first one waits for it or is stuck.

torchrun ... failing.py waits|stuck [key=value ...]
"""

import os
import sys
import time
from pathlib import Path

from anchorctx.cli import main as cli
from anchorctx.train.loop import Trainer

real = Trainer.train_step


def train_step(self):
    if self.step == 1 and os.environ["RANK"] == "1":
        Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
        raise RuntimeError("the second process has lost its disk")
    while self.step == 1 and sys.argv[1] == "stuck":
        time.sleep(1)  # as in a collective of CUDA: SIGTERM does not end it
    return real(self)


Trainer.train_step = train_step
sys.exit(cli.main(["train", *sys.argv[2:]]))
