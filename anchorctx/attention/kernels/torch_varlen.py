"""torch's own FlashAttention-2 for CUDA, in its varlen form: nothing to install.

The operators are those behind `torch.nn.attention.varlen.varlen_attn`; called directly they hand out the log-sum-exp
and take the total softmax's in backward. They know a sliding window, but no soft-capping.
"""

from __future__ import annotations

import functools

import torch

from anchorctx.attention.kernels.base import Attended, Score, Tile
from anchorctx.attention.kernels.varlen import Packed, VarlenKernel
from anchorctx.errors import BackendUnavailableError

aten = torch.ops.aten
MIN_CAPABILITY = (8, 0)
"""FlashAttention-2 needs an Ampere card or newer."""


class TorchVarlenKernel(VarlenKernel):
    """See the module docstring; implements `Kernel`."""

    def varlen_forward(self, packed: Packed, tile: Tile, score: Score) -> tuple[torch.Tensor, torch.Tensor]:
        """See `VarlenKernel.varlen_forward`."""
        o, lse, *_ = aten._flash_attention_forward(
            *packed,
            tile.cu_seqlens,
            tile.cu_seqlens,
            tile.max_seqlen,
            tile.max_seqlen,
            0.0,
            score.window is None,
            False,
            scale=score.scale,
            **_window(score),
        )
        return o, lse

    def varlen_backward(
        self, do: torch.Tensor, attended: Attended, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `VarlenKernel.varlen_backward`."""
        rng_state = torch.empty(2, dtype=torch.uint64, device=do.device)  # read only where there is dropout
        return aten._flash_attention_backward(
            do,
            *attended,
            tile.cu_seqlens,
            tile.cu_seqlens,
            tile.max_seqlen,
            tile.max_seqlen,
            0.0,
            score.window is None,
            rng_state,
            rng_state.new_empty(0),
            scale=score.scale,
            **_window(score),
        )


def _window(score: Score) -> dict[str, int]:
    """The window's arguments: a query sees the keys from `left` before it up to itself; none where it sees them all.

    `is_causal` says the rest. FlashAttention-2 would take (-1, 0) for that too, but FlashAttention-4, which may stand
    behind these operators (`torch.nn.attention.activate_flash_attention_impl`), would take it for a window.
    """
    if score.softcap is not None:
        raise BackendUnavailableError(
            f"torch's varlen kernels cannot soft-cap scores ({score.softcap}): use flash_attn"
        )
    return {} if score.window is None else {"window_size_left": score.window - 1, "window_size_right": 0}


@functools.lru_cache(maxsize=1)
def missing() -> str | None:
    """What this backend lacks here, as the end of a sentence; None when it can be called."""
    return missing_cuda(MIN_CAPABILITY)


def missing_cuda(minimum: tuple[int, int]) -> str | None:
    """Why there is no CUDA device of at least this compute capability, as the end of a sentence; None if there is."""
    if torch.version.cuda is None:
        return f"needs torch built for CUDA, but this is torch {torch.__version__}"
    if not torch.cuda.is_available():
        return "needs a CUDA device, but torch sees none"
    capability = torch.cuda.get_device_capability()
    if capability < minimum:
        have, need = (".".join(map(str, version)) for version in (capability, minimum))
        return f"needs a card of compute capability {need} or newer, but {torch.cuda.get_device_name()} has {have}"
    return None
