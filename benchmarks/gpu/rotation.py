"""The fused kernels against what they replace, on one CUDA card: one layer of 65,536 tokens, bfloat16.

  rotation   transformers' operators in float32 and a cast, against the kernel: ms, GB/s of the bytes that must be moved
             (q and k in and out, cosines and sines in), and whether results and gradients are equal to the last bit
  merge      `attend` with one shared anchor, merged in by torch's operators and by the kernels, against `attend` over
             the documents alone

`--tune` also times the rotation in blocks of other sizes. About half a minute:

    python benchmarks/gpu/rotation.py --out rotation.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from attention import both, in_turns, packed_row, tensors
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from anchorctx.attention import attend, merge, rotation
from anchorctx.attention.fused import rotation as kernel
from anchorctx.layout import Pattern
from anchorctx.records.manifest import build_manifest, write_json

Rotate = Callable[..., tuple[torch.Tensor, ...]]


def main() -> None:
    """Measure both and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu/rotation.json"))
    parser.add_argument("--tokens", type=int, default=65536, help="row length")
    parser.add_argument("--documents", default="256,2048", help="lengths in tokens, for the merge")
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("QUERY", "KEY", "DIM"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tune", action="store_true", help="also other blocks of the rotation")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA card")
    rows = rotations(arguments.tokens, arguments.heads, arguments.rounds, arguments.tune)
    rows += [merges(x, arguments.tokens, arguments.heads, arguments.rounds) for x in arguments.documents.split(",")]
    for row in rows:
        print(row, flush=True)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    facts = {"card": torch.cuda.get_device_name(), "settings": settings}
    write_json(arguments.out, {"manifest": build_manifest("benchmarks/gpu/rotation", facts), "rows": rows})


def rotations(tokens: int, heads: tuple[int, int, int], rounds: int, tune: bool) -> list[dict[str, Any]]:
    """The operators, the kernel, and where asked for the kernel in other blocks."""
    q, k, _, dq = tensors(tokens, heads)
    angles = torch.arange(tokens, device="cuda")[:, None] / 5e5 ** torch.arange(0, 1, 2 / heads[2], device="cuda")
    angles = torch.cat([angles, angles], -1)[None]
    given = (q, k, angles.cos(), angles.sin(), dq, torch.randn_like(k))
    found = [("operators", rotation_row(operators, given, rounds)), ("kernel", rotation_row(fused, given, rounds))]
    for block, group, warps in [(8, 8, 4), (16, 4, 4), (16, 40, 4), (32, 8, 4), (32, 8, 8), (32, 4, 8)] if tune else []:
        changed = {"BLOCK": block, "HEADS": group, "LAUNCH": kernel.LAUNCH | {"num_warps": warps}}
        with mock.patch.multiple(kernel, **changed):
            found.append((f"block {block}, heads {group}, warps {warps}", rotation_row(fused, given, rounds)))
    return [{"rotation": name} | row for name, row in found]


def operators(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """transformers' rotation of a Llama, and attention's cast."""
    return tuple(x.to(q.dtype) for x in apply_rotary_pos_emb(q, k, cos, sin))


def fused(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same as models call it."""
    return rotation.rotate(apply_rotary_pos_emb, q, k, cos, sin)


def rotation_row(rotate: Rotate, given: tuple[torch.Tensor, ...], rounds: int) -> dict[str, Any]:
    """Milliseconds and GB/s of the bytes that must be moved, each way; are the results those of the operators?"""
    q, k, cos, sin, *gradients = given
    leaves = [x.detach().requires_grad_() for x in (q, k)]

    def turned(rotate: Rotate) -> tuple[torch.Tensor, ...]:
        outputs = rotate(*leaves, cos, sin)
        return *outputs, *torch.autograd.grad(outputs, leaves, gradients)

    same = all(torch.equal(a, b) for a, b in zip(turned(rotate), turned(operators), strict=True))
    kept = rotate(*leaves, cos, sin)
    times = in_turns(
        {
            "forward": lambda: rotate(q, k, cos, sin),
            "backward": lambda: torch.autograd.grad(kept, leaves, gradients, retain_graph=True),
        },
        rounds,
    )
    milliseconds = {name: statistics.median(values) for name, values in times.items()}
    needed = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
    return {
        "milliseconds": milliseconds,
        "gigabytes_per_second": {name: needed / 1e6 / ms for name, ms in milliseconds.items()},
        "equal_to_the_last_bit": same,
    }


def merges(documents: str, tokens: int, heads: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Milliseconds, forward and backward: documents alone, and with an anchor merged in, either way."""
    row = packed_row(documents, tokens)
    plain = Pattern.intra_doc.apply(row)
    given = tensors(tokens, heads)

    def by_operators(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(merge, "_fuses", return_value=False):
            return attend(q, k, v, (row,), backend="torch_varlen")

    variants = {
        "documents": both(lambda q, k, v: attend(q, k, v, (plain,), backend="torch_varlen"), *given),
        "operators": both(by_operators, *given),
        "kernels": both(lambda q, k, v: attend(q, k, v, (row,), backend="torch_varlen"), *given),
    }
    gradients: Any = [variants[name]() for name in ("operators", "kernels")]
    times = in_turns(variants, rounds)
    pairs = {name: zip(times[name], times["documents"], strict=True) for name in times}
    return {
        "merge": f"documents of {documents}",
        "milliseconds": {name: statistics.median(values) for name, values in times.items()},
        "of_documents": {name: statistics.median(a / b for a, b in found) for name, found in pairs.items()},
        "largest_deviation_of_gradients": max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True)),
        "largest_gradient": max(x.abs().max().item() for x in gradients[0]),
    }


if __name__ == "__main__":
    main()
