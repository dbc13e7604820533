"""The fused kernels against what they replace: one layer of Llama-3.1-8B's heads, rows of 65,536 tokens.

  rotation   transformers' operators in float32 and a cast, against the kernel: ms and GB/s of the bytes that must be
             moved (q and k in and out, cosines and sines in), and whether all results are equal to the last bit
  merge      `attend` with one shared anchor, merged in by torch's operators and by the kernels, against `attend` over
             the documents alone

On a CPU, where models rotate and merge by torch's operators, both ways are the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from unittest import mock

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from anchorctx.attention import merge, rotation
from anchorctx.layout import Pattern
from stages.attention import both, ours, packed_row, tensors
from stages.stage import Stage, median_ms, milliseconds

TOKENS, DOCUMENTS, ROUNDS, THETA = 65_536, ("256", "2048"), 9, 5e5
Rotate = Callable[..., tuple[torch.Tensor, ...]]


def run(stage: Stage) -> None:
    """Both tables."""
    for name, rotate in {"operators": operators, "kernel": kernel}.items():
        stage.measure("rotation", lambda rotate=rotate: rotated(stage, rotate), needs=3, rotation=name)
    for documents in ("64",) if stage.tiny else DOCUMENTS:
        stage.measure("merge", lambda d=documents: merged(stage, d), needs=3, documents=documents)


def operators(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """transformers' rotation of a Llama, and attention's cast."""
    return tuple(x.to(q.dtype) for x in apply_rotary_pos_emb(q, k, cos, sin))


def kernel(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same as models call it."""
    return rotation.rotate(apply_rotary_pos_emb, q, k, cos, sin)


def rotated(stage: Stage, rotate: Rotate) -> Mapping[str, object]:
    """Each way's milliseconds and GB/s; are results and gradients those of the operators?"""
    tokens = 256 if stage.tiny else TOKENS
    q, k, _, dq = tensors(tokens, stage)
    powers = torch.arange(0, 1, 2 / q.shape[-1], device=stage.device)
    angles = torch.arange(tokens, device=stage.device)[:, None] / THETA**powers
    angles = torch.cat([angles, angles], -1)[None]
    cos, sin, gradients = angles.cos(), angles.sin(), (dq, torch.randn_like(k))
    leaves = [x.detach().requires_grad_() for x in (q, k)]

    def all_of(rotate: Rotate) -> tuple[torch.Tensor, ...]:
        outputs = rotate(*leaves, cos, sin)
        return *outputs, *torch.autograd.grad(outputs, leaves, gradients)

    same = all(torch.equal(a, b) for a, b in zip(all_of(rotate), all_of(operators), strict=True))
    kept = rotate(*leaves, cos, sin)
    ms = {
        "forward": median_ms(lambda: rotate(q, k, cos, sin), stage.device, ROUNDS),
        "backward": median_ms(
            lambda: torch.autograd.grad(kept, leaves, gradients, retain_graph=True), stage.device, ROUNDS
        ),
    }
    needed = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
    rates = {f"{name} GB/s": needed / 1e6 / value for name, value in ms.items()}
    return {**{f"{name} ms": value for name, value in ms.items()}, **rates, "equal": same, "ok": same}


def merged(stage: Stage, documents: str) -> Mapping[str, object]:
    """Milliseconds, forward and backward, and times the documents alone, in turns; the gradients' deviation."""
    row = packed_row(documents, 256 if stage.tiny else TOKENS)
    given = tensors(row.length, stage)
    kernels = both(ours(row), given)

    def by_operators() -> object:
        with mock.patch.object(merge, "_fuses", return_value=False):
            return kernels()

    variants = {"alone": both(ours(Pattern.intra_doc.apply(row)), given), "operators": by_operators, "kernels": kernels}
    for own in variants.values():  # to warm up
        own()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(2 if stage.tiny else ROUNDS):
        for name, own in variants.items():
            times[name].append(milliseconds(own, stage.device))
    cells: dict[str, object] = {f"{name} ms": statistics.median(values) for name, values in times.items()}
    for name in ("operators", "kernels"):
        pairs = zip(times[name], times["alone"], strict=True)
        cells[f"{name} of alone"] = statistics.median(a / b for a, b in pairs)
    gradients = zip(by_operators(), kernels(), strict=True)  # type: ignore[arg-type]
    return {**cells, "largest deviation": max((a - b).abs().max().item() for a, b in gradients)}
