"""Weights & Biases: whether it is wanted, and how a run there begins, for training and reports alike."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from anchorctx.errors import UserError


class WandbMode(StrEnum):
    """Whether something also goes to Weights & Biases."""

    disabled = "disabled"
    offline = "offline"
    """Into a folder `wandb` beside what else is written, without an account; `wandb sync` uploads it later. Each start
    of a resumed training run writes a folder there, the newest of which holds the whole run."""
    online = "online"


def check_wandb(mode: WandbMode, key: str) -> None:
    """UserError when W&B is wanted and not installed; `key` is where the user asked for it."""
    try:
        if mode is not WandbMode.disabled:
            import wandb  # noqa: F401
    except ImportError as error:
        raise UserError(f"{key}={mode.value} needs wandb: pip install 'anchorctx[wandb]'") from error


def start_wandb(mode: WandbMode, key: str, **options: Any) -> Any:
    """`wandb.init(**options)`; UserError when it does not start, such as without an account."""
    import wandb

    try:
        return wandb.init(mode=mode.value, **options)
    except wandb.Error as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"{key}={mode.value} cannot start ({reason}): run `wandb login`, or set {key}=offline and upload later "
            "with `wandb sync`"
        ) from error
