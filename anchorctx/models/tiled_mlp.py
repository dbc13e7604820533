"""MLPs that see a tile of tokens at a time: their intermediate activations never exist for the whole row.

An MLP works on each token alone, so tiles change nothing but the order of sums. Forward keeps only the input; backward
recomputes tile by tile, sums the weights' gradients in float32 and hands each over once, so that ZeRO's hooks, which
count gradients, hold. (DeepSpeed's TiledMLP runs a backward pass per tile within the backward pass and has to be told
which weights to hold back.) The idea of tiling MLPs over the sequence is ALST's (arXiv 2506.13996, section 3.1).

Under ZeRO 3 an MLP is marked as a leaf, so that its weights are gathered once for all tiles, not once a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig, PreTrainedModel

from anchorctx.errors import UserError

Forward = Callable[[torch.Tensor], torch.Tensor]


def tile_mlps(model: PreTrainedModel, tokens: int) -> None:
    """Let every MLP of the model work on at most `tokens` tokens at once; idempotent.

    Raises:
        UserError: the model's MLPs are mixtures of experts, which route a batch as a whole, or have no known name.
    """
    config = model.config.get_text_config()
    if routes(config):
        raise UserError(
            f"memory.mlp_tile={tokens} cannot cut the experts of {config.model_type}, which route a row as a whole: "
            "set memory.mlp_tile=0"
        )
    mlps = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    if not mlps:
        raise UserError(f"memory.mlp_tile={tokens} finds no MLP in {config.model_type}: set memory.mlp_tile=0")
    for mlp in mlps:
        # idempotent: `_tiled` calls the class's forward, not the one that it replaces
        mlp.forward = partial(_tiled, mlp, tokens)
        vars(mlp)["_z3_leaf"] = True  # what deepspeed.utils.set_z3_leaf_modules sets


def routes(config: PretrainedConfig) -> bool:
    """Are the MLPs of a text model mixtures of experts?"""
    return bool(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None))


def _tiled(mlp: nn.Module, tokens: int, x: torch.Tensor) -> torch.Tensor:
    """x (..., D) -> (..., D)."""
    whole = partial(type(mlp).forward, mlp)
    if x.shape[:-1].numel() <= tokens:
        return whole(x)
    # Given one by one, so that autograd asks for their gradients, and as a list, which the context keeps.
    parameters = [p for p in mlp.parameters() if p.requires_grad]
    out = _TiledForward.apply(x, whole, tokens, parameters, *parameters)
    assert isinstance(out, torch.Tensor)
    return out


class _TiledForward(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, whole: Forward, tokens: int, parameters: list[nn.Parameter], *_: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.whole, ctx.tokens, ctx.parameters = whole, tokens, parameters
        flat, out = x.flatten(0, -2), torch.empty_like(x)
        for tile in _tiles(flat, tokens):
            out.view(flat.shape)[tile] = whole(flat[tile])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        flat, grad = x.detach().flatten(0, -2), grad.flatten(0, -2)
        dx = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in ctx.parameters]
        for tile in _tiles(flat, ctx.tokens):
            # a leaf of its own, so that the inner graph ends here
            piece = flat[tile].requires_grad_()
            with torch.enable_grad():
                out = ctx.whole(piece)
            dpiece, *dweights = torch.autograd.grad(out, [piece, *ctx.parameters], grad[tile])
            if dx is not None:
                dx[tile] = dpiece
            for total, part in zip(sums, dweights, strict=True):
                total += part
        grads = [total.to(p.dtype) for total, p in zip(sums, ctx.parameters, strict=True)]
        return (None if dx is None else dx.view(x.shape)), None, None, None, *grads


def _tiles(x: torch.Tensor, tokens: int) -> list[slice]:
    return [slice(start, start + tokens) for start in range(0, x.shape[0], tokens)]
