"""ZeRO 3 from the start: while a model is built or loaded, each process holds its share of every weight, and one whole
module at a time.

transformers does this itself when it finds a live DeepSpeed configuration, which it otherwise gets from its Trainer:
modules are built under `deepspeed.zero.Init`, and only the first process reads a checkpoint, mapped into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _LiveConfig:
    """What transformers asks of a configuration; its own class needs accelerate."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


@contextmanager
def sharded_loading(config: dict[str, Any]) -> Iterator[None]:
    """Inside it transformers spreads every model that it builds or loads over all processes (ZeRO 3).

    `config` is the whole DeepSpeed configuration, as for `deepspeed.initialize`.
    """
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    live = _LiveConfig(config)  # transformers keeps a weak reference
    set_hf_deepspeed_config(live)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del live
