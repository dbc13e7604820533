"""What the anchor costs on a GPU: attention forward and backward over one packed row, one layer, bfloat16.

For documents of equal and of log-normal lengths it times, in turns, round after round,

  kernel      torch's own varlen flash attention over the documents, nothing of ours: the floor
  intra_doc   `attend` without an anchor
  anchor      `attend` with one shared anchor, merged in
  copies      `attend` over the row with a copy of the anchor in front of every document: what training does (the same
              attention; gathering happens where rows are made, so is not timed)
  full        causal attention over the whole row, torch's flash attention

Ratios are taken within a round, and their median is reported. Before it is timed, `copies` is compared with `anchor`.
Run on a machine with one CUDA card:

    python benchmarks/gpu/attention.py --out attention.json
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.functional import scaled_dot_product_attention

from anchorctx.attention import attend
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.records.manifest import build_manifest, write_json

MEDIAN_LENGTH, SPREAD = 800, 1.2
"""The log-normal lengths: median in tokens, standard deviation of the logarithm."""

Run = Callable[[], object]


def main() -> None:
    """Measure every kind of row and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu/attention.json"))
    parser.add_argument("--tokens", type=int, default=65536, help="row length")
    parser.add_argument("--documents", default="256,1024,2048,8192,lognormal", help="lengths in tokens, or lognormal")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("QUERY", "KEY", "DIM"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA card: benchmarks/attention.py measures a CPU")
    rows = []
    for kind in arguments.documents.split(","):
        rows.append(measured(kind, arguments.tokens, arguments.heads, arguments.rounds))
        print(line(rows[-1]), flush=True)
        settings = {name: value for name, value in vars(arguments).items() if name != "out"}
        facts = {"card": torch.cuda.get_device_name(), "settings": settings}
        write_json(arguments.out, {"manifest": build_manifest("benchmarks/gpu/attention", facts), "rows": rows})


def measured(kind: str, tokens: int, heads: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Milliseconds (forward and backward) of each variant, each one's median ratio to `kernel`, and the deviation."""
    row = packed_row(kind, tokens)
    plain = Pattern.intra_doc.apply(row)
    q, k, v, do = tensors(tokens, heads)
    with_copies, found = row.with_copies()
    index = torch.from_numpy(found).cuda()
    copied = [x[:, :, index].transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, do)]
    documents = boundaries(plain.doc_offsets)
    variants: dict[str, Run] = {
        "kernel": both(lambda q, k, v: flash(q, k, v, documents), q, k, v, do),
        "intra_doc": both(lambda q, k, v: attend(q, k, v, (plain,), backend="torch_varlen"), q, k, v, do),
        "anchor": both(lambda q, k, v: attend(q, k, v, (row,), backend="torch_varlen"), q, k, v, do),
        "copies": both(lambda q, k, v: attend(q, k, v, (with_copies,), backend="torch_varlen"), *copied),
        "full": both(full_attention, q, k, v, do),
    }
    anchored = attend(q, k, v, (row,), backend="torch_varlen")
    private = attend(copied[0], copied[1], copied[2], (with_copies,), backend="torch_varlen")
    times = in_turns(variants, rounds)
    ratios = {
        name: statistics.median(t / f for t, f in zip(times[name], times["kernel"], strict=True)) for name in times
    }
    return {
        "documents": kind,
        "count": row.num_documents,
        "tokens": tokens,
        "tokens_with_copies": len(index),
        "milliseconds": {name: statistics.median(values) for name, values in times.items()},
        "of_kernel": ratios,
        "largest_deviation_of_copies": (private - anchored[:, :, index]).abs().max().item(),
        "largest_output": anchored.abs().max().item(),
    }


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


def tensors(tokens: int, heads: tuple[int, int, int]) -> list[torch.Tensor]:
    """Random q, k, v and output gradient, (1, H, T, D) in bfloat16, in memory as projections leave them."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, tokens, h, heads[2]) for h in (heads[0], heads[1], heads[1], heads[0])]
    made = [torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes]
    return [x.transpose(1, 2) for x in made]


def boundaries(offsets: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    """(N+1,) int32 on the card, and the longest document."""
    found = torch.tensor(offsets, dtype=torch.int32)
    return found.cuda(), int(found.diff().max())


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: tuple[torch.Tensor, int]) -> torch.Tensor:
    """torch's varlen attention, causal inside documents: (1, H, T, D) -> (1, Hq, T, D)."""
    cu_seqlens, longest = documents
    known = inspect.signature(varlen.varlen_attn).parameters  # torch 2.10 says is_causal=True
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    options |= {"enable_gqa": True} if "enable_gqa" in known else {}
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    out = varlen.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, torch.Tensor)
    return out.transpose(0, 1)[None]


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal over the whole row."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def both(attention: Callable[..., torch.Tensor], *qkv_do: torch.Tensor) -> Run:
    """Forward and backward of `attention`."""
    *qkv, do = qkv_do
    leaves = [x.detach().requires_grad_() for x in qkv]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, do)


def in_turns(variants: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every variant in every round, by CUDA events, after one call of each to warm up."""
    for run in variants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run()
            ended.record()
            torch.cuda.synchronize()
            times[name].append(began.elapsed_time(ended))
    return times


def line(row: dict[str, Any]) -> str:
    """A row's figures for the screen."""
    head = f"{row['documents']:>9} x {row['count']:<5}"
    parts = [f"{name} {ms:8.2f} ms ({row['of_kernel'][name]:.2f})" for name, ms in row["milliseconds"].items()]
    return "  ".join([head, *parts, f"copies deviate by {row['largest_deviation_of_copies']:.1e}"])


if __name__ == "__main__":
    main()
