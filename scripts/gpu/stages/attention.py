"""What the anchor costs: attention forward and backward, one layer of Llama-3.1-8B's heads, one packed row.

For documents of equal and of log-normal lengths, in turns, round after round:

  kernel      torch's varlen flash operators over the documents, nothing of ours and no autograd: the floor
  intra_doc   `attend` without an anchor
  copies      `attend` over the row with a copy of the anchor in front of every document: what training does (the same
              attention; gathering happens where rows are made, so is not timed)
  anchor      `attend` with one shared anchor, merged in
  flex        FlexAttention with the anchor in its mask

and for each row length causal attention over the whole row, torch's flash and cuDNN's. Ratios to `kernel` are taken
within a round. A CPU has no varlen operators: there `kernel` is one causal call a document.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from anchorctx.attention import attend
from anchorctx.layout import PackedLayout, Pattern
from stages.stage import Stage, attempt, median_ms, milliseconds

HEADS = (32, 8, 128)
"""Query heads, key heads, head dimension: Llama-3.1-8B's."""
LENGTHS, DOCUMENTS = (65_536, 131_072), ("2048", "8192", "lognormal", "1024", "256")
TINY_HEADS, TINY_LENGTHS, TINY_DOCUMENTS = (4, 2, 16), (256,), ("64", "lognormal")
MEDIAN_LENGTH, SPREAD = 800, 1.2
"""The log-normal lengths: median in tokens, standard deviation of the logarithm."""
ROUNDS = 7
FULL_ROUNDS = 3
"""A call takes 1.5 s at 131,072 tokens on an H200."""
FULL_SECONDS, COMPILE_SECONDS = 10.0, 25.0

aten = torch.ops.aten
Tensors = tuple[torch.Tensor, ...]
Run = Callable[[], object]


def run(stage: Stage) -> None:
    """Everything but FlexAttention first, which has to be compiled."""
    lengths, kinds = (TINY_LENGTHS, TINY_DOCUMENTS) if stage.tiny else (LENGTHS, DOCUMENTS)
    rows = {(length, kind): packed_row(kind, length) for length in lengths for kind in kinds}
    kernel = {key: in_turns(stage, key[1], row) for key, row in rows.items()}
    for length in lengths:
        backends = {"flash": SDPBackend.FLASH_ATTENTION}
        if stage.device.type == "cuda":
            backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION
        for name, backend in backends.items():
            stage.measure(
                "attention",
                lambda length=length, backend=backend: full(stage, length, backend),
                needs=FULL_SECONDS,
                tokens=length,
                documents="one",
                variant=f"full causal, {name}",
            )
    for (length, kind), row in rows.items():
        stage.measure(
            "attention",
            lambda row=row, floor=kernel[length, kind]: flex(stage, row, floor),
            needs=COMPILE_SECONDS,
            tokens=length,
            documents=named(kind, row),
            variant="flex",
        )


def in_turns(stage: Stage, kind: str, row: PackedLayout) -> float | None:
    """Measure a row's variants and write them; returns the kernel's own milliseconds, None where it failed."""
    qkv_do = tensors(row.length, stage)
    copied_layout, index = row.with_copies()
    where = torch.from_numpy(index).to(stage.device)
    copied = tuple(x[:, :, where].transpose(1, 2).contiguous().transpose(1, 2) for x in qkv_do)
    plain = Pattern.intra_doc.apply(row)
    variants = {
        "kernel": kernel_alone(plain.doc_offsets, qkv_do),
        "intra_doc": both(ours(plain), qkv_do),
        "copies": both(ours(copied_layout), copied),
        "anchor": both(ours(row), qkv_do),
    }
    facts = {"tokens": row.length, "documents": named(kind, row)}
    problems = {name: attempt(partial(called, run)) for name, run in variants.items()}
    times: dict[str, list[float]] = {name: [] for name, problem in problems.items() if not problem}
    for _ in range(2 if stage.tiny else ROUNDS):
        for name, own in times.items():
            own.append(milliseconds(variants[name], stage.device))
    floor = times.get("kernel")
    for name, problem in problems.items():
        if problem:
            stage.row("attention", {**facts, "variant": name, **problem})
    for name, own in times.items():
        found: dict[str, object] = {"variant": name, "ms": statistics.median(own)}
        if floor is not None:
            found["of kernel"] = statistics.median(t / f for t, f in zip(own, floor, strict=True))
        stage.row("attention", {**facts, **found})
    stage.measure("copies against the merge", lambda: deviation(row, qkv_do, copied_layout, copied, where), **facts)
    return statistics.median(floor) if floor is not None else None


def called(run: Run) -> Mapping[str, object]:
    """Once, to warm up."""
    run()
    return {}


def deviation(
    row: PackedLayout, qkv_do: Tensors, copied_layout: PackedLayout, copied: Tensors, where: torch.Tensor
) -> Mapping[str, object]:
    """Two ways to one output, forward."""
    with torch.no_grad():
        shared = ours(row)(*qkv_do[:3])
        private = ours(copied_layout)(*copied[:3])
    return {
        "largest deviation": (private - shared[:, :, where]).abs().max().item(),
        "largest": shared.abs().max().item(),
    }


def full(stage: Stage, length: int, backend: SDPBackend) -> Mapping[str, object]:
    """Causal attention over the whole row."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return {"ms": median_ms(both(attention, tensors(length, stage)), stage.device, FULL_ROUNDS)}


def flex(stage: Stage, row: PackedLayout, floor: float | None) -> Mapping[str, object]:
    """FlexAttention over the row; its ratio is to the kernel's median, since it was not measured in turns with it."""
    ms = median_ms(both(ours(row, "flex"), tensors(row.length, stage)), stage.device, ROUNDS)
    return {"ms": ms} if floor is None else {"ms": ms, "of kernel": ms / floor}


def packed_row(kind: str, tokens: int) -> PackedLayout:
    """The anchor and documents of one length, or of log-normal lengths, until the row is full."""
    if kind != "lognormal":
        return PackedLayout((0, 1, *range(int(kind), tokens, int(kind)), tokens), 1)
    draw = np.random.default_rng(0)
    offsets = [0, 1]
    while offsets[-1] < tokens:
        length = max(int(draw.lognormal(np.log(MEDIAN_LENGTH), SPREAD)), 1)
        offsets.append(min(offsets[-1] + length, tokens))
    return PackedLayout(tuple(offsets), 1)


def named(kind: str, row: PackedLayout) -> str:
    """The row's documents in tables."""
    return f"{row.num_documents} of {kind}"


def tensors(tokens: int, stage: Stage) -> Tensors:
    """Random q, k, v and output gradient, (1, H, T, D), in memory as projections leave them."""
    query, key, dim = TINY_HEADS if stage.tiny else HEADS
    generator = torch.Generator(stage.device).manual_seed(0)
    shapes = [(1, tokens, heads, dim) for heads in (query, key, key, query)]
    made = [torch.randn(shape, generator=generator, device=stage.device, dtype=stage.dtype) for shape in shapes]
    return tuple(x.transpose(1, 2) for x in made)


def ours(layout: PackedLayout, backend: str | None = None) -> Callable[..., torch.Tensor]:
    """`attend` with torch's kernel, or a CPU's."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        name = backend or ("torch_varlen" if q.is_cuda else "cpu")
        return attend(q, k, v, (layout,), backend=name)

    return attention


def kernel_alone(offsets: tuple[int, ...], qkv_do: Tensors) -> Run:
    """The two operators behind torch's varlen attention, causal inside documents; a CPU has no such kernel."""
    if not qkv_do[0].is_cuda:
        return both(partial(calls, offsets), qkv_do)
    q, k, v, do = (x[0].transpose(0, 1) for x in qkv_do)  # (T, H, D), as they lie in memory
    boundaries = torch.tensor(offsets, dtype=torch.int32)
    ends, longest = boundaries.to(q.device), int(boundaries.diff().max())
    lengths, scale = (ends, ends, longest, longest), q.shape[-1] ** -0.5

    def run() -> None:
        o, lse, seed, offset, _ = aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False, scale=scale)
        aten._flash_attention_backward(do, q, k, v, o, lse, *lengths, 0.0, True, seed, offset, scale=scale)

    return run


def calls(offsets: tuple[int, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One causal call a document: (1, H, T, D) -> (1, Hq, T, D)."""
    own = [
        scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, enable_gqa=True)
        for a, b in zip(offsets, offsets[1:], strict=False)
    ]
    return torch.cat(own, dim=2)


def both(attention: Callable[..., torch.Tensor], qkv_do: Tensors) -> Run:
    """Forward and backward of `attention`."""
    *qkv, do = qkv_do
    leaves = [x.detach().requires_grad_() for x in qkv]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, do)
