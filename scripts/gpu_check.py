"""Every attention backend that works on this GPU, against a float64 reference: one table of errors and times.

A backend passes a case when its largest error, in the output and in each gradient, is at most twice that of plain eager
code in the same dtype (`anchorctx.testing.numerics`). Times are medians of forward + backward, measured with CUDA
events, beside full causal `scaled_dot_product_attention` on the same tensors. Exits 1 when a case fails or there is no
GPU. Run it with `bash scripts/gpu_check.sh`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from anchorctx.attention import BACKENDS, attend
from anchorctx.attention.kernels import flash_attn
from anchorctx.attention.kernels.base import Score
from anchorctx.attention.kernels.torch_varlen import missing_cuda
from anchorctx.errors import BackendUnavailableError
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.records.manifest import build_manifest, write_json
from anchorctx.testing.numerics import Attention, Deviation, deviations

DEVICE = "cuda"
HEADS = 8
DIM = 64
TOKENS = 1000
"""Of a row in the error table: no multiple of any block size."""
PUBLIC = "flash_attn public"
"""flash-attn's public function over gathered keys: an independent second way, not a backend."""


@dataclass(frozen=True)
class Case:
    """One line of the error table."""

    name: str
    layouts: tuple[PackedLayout, ...]
    score: Score = Score(DIM**-0.5)
    kv_heads: int = HEADS


def cases() -> list[Case]:
    """Layouts of every pattern, and everything else that a backend may compute differently."""
    row = PackedLayout((0, 1, 2, 301, 429, 700, TOKENS), 1)
    other = PackedLayout((0, 1, 500, 501, TOKENS), 1)
    interleaved = PackedLayout(row.doc_offsets, 1, doc_ids=(9, 1, 2, 1, 3, 2))
    patterns = (Pattern.full, Pattern.intra_doc, Pattern.anchor)
    anchor = Case("batch of 2", (row, other))
    return [
        *(Case(pattern.value, (pattern.apply(row),)) for pattern in patterns),
        anchor,
        Case("anchor of 4", (PackedLayout((0, 4, 5, 300, TOKENS), 4),)),
        Case("interleaved", (interleaved,)),
        replace(anchor, name="grouped heads", kv_heads=2),
        replace(anchor, name="window", score=Score(DIM**-0.5, window=100)),
        replace(anchor, name="softcap", score=Score(DIM**-0.5, softcap=20.0)),
        Case("2,000 tiny documents", (PackedLayout((0, 1, *range(2, 2 * TOKENS + 1)), 1),)),
    ]


def functions(case: Case) -> dict[str, Attention]:
    """What computes a case: each backend but the reference, and the public function, by name."""

    def backend(name: str) -> Attention:
        s = case.score
        options: dict[str, Any] = {"scale": s.scale, "window": s.window, "softcap": s.softcap, "backend": name}
        return lambda q, k, v: attend(q, k, v, case.layouts, **options)

    on_gpu = [name for name, b in BACKENDS.items() if DEVICE in b.devices and name != "reference"]
    found = {name: backend(name) for name in on_gpu}
    gathers = case.score.window is None and all(layout.doc_ids is None for layout in case.layouts)
    if gathers and flash_attn.missing() is None:
        found[PUBLIC] = lambda q, k, v: flash_attn.gathered_attention(q, k, v, case.layouts, case.score)
    return found


def draw(rows: int, heads: int, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """(B, H, T, D) normal numbers on the GPU, in memory as (B, T, H, D), as projections leave them."""
    return torch.randn(rows, tokens, heads, DIM, generator=generator, device=DEVICE, dtype=dtype).transpose(1, 2)


def tensors(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Seeded query, key, value and output gradient of a case."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    heads = (HEADS, case.kv_heads, case.kv_heads, HEADS)
    return [draw(len(case.layouts), h, case.layouts[0].length, dtype, generator) for h in heads]


def errors(case: Case, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Each backend's deviations in one case and dtype; those that cannot serve it say why."""
    rows = []
    for name, attention in functions(case).items():
        row: dict[str, Any] = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "backend": name}
        try:
            row["deviations"] = deviations(attention, tensors(case, dtype), case.layouts, case.score)
        except BackendUnavailableError as refusal:
            row["refused"] = str(refusal)
        except Exception as failure:  # a kernel that fails is a result: the table shows it beside the others
            row["failed"] = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
        rows.append(row)
    return rows


def milliseconds(attention: Attention, inputs: Sequence[torch.Tensor], repeats: int) -> float:
    """Median time of forward + backward, CUDA events, after three runs to warm up (and compile)."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    times = []
    for run in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.autograd.grad(attention(q, k, v), (q, k, v), inputs[3])
        end.record()
        end.synchronize()
        times += [start.elapsed_time(end)] if run >= 3 else []
    return statistics.median(times)


def timings(tokens: int, document: int, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """AnchorAttention over documents of one length against full causal attention, in one process."""
    layout = PackedLayout((0, 1, *range(document, tokens, document), tokens), 1)
    case = Case("timing", (layout,))
    inputs = tensors(case, dtype)

    def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    rows: list[dict[str, Any]] = [{"backend": "full causal SDPA", "ms": milliseconds(full, inputs, repeats)}]
    for name, attention in functions(case).items():
        try:
            rows.append({"backend": name, "ms": milliseconds(attention, inputs, repeats)})
        except BackendUnavailableError:
            continue  # the error table says why
    for row in rows:
        row["times_faster"] = rows[0]["ms"] / row["ms"]
    return rows


def line(row: dict[str, Any]) -> str:
    """One row of the error table: the largest error of each tensor, in brackets the eager code's."""
    head = f"{row['case']:<22}{row['dtype']:<10}{row['backend']:<19}"
    if "deviations" not in row:
        return head + (f"refused: {row['refused']}" if "refused" in row else f"FAILED: {row['failed']}")
    found: list[Deviation] = row["deviations"]
    cells = "".join(f"{d.error:9.1e} ({d.eager_error:.1e})" for d in found)
    return head + cells + ("  ok" if passed(row) else "  FAILED")


def passed(row: dict[str, Any]) -> bool:
    """Did the backend compute the case within its bound? A refusal by name is no failure."""
    return "failed" not in row and all(d.ok for d in row.get("deviations", ()))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file, e.g. benchmarks/gpu_check.json")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the timed row")
    parser.add_argument("--document", type=int, default=1024, help="tokens of its documents")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs, of which the median is taken")
    return parser.parse_args(argv)


def report(print_line: Callable[[str], None], options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Measure everything, printing as it goes."""
    print_line(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print_line("largest error against float64 (in brackets: eager code of the same dtype; allowed is twice that)\n")
    print_line(f"{'case':<22}{'dtype':<10}{'backend':<19}" + "".join(f"{n:<19}" for n in ("output", "dq", "dk", "dv")))
    found = []
    for case in cases():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for row in errors(case, dtype):
                if dtype is torch.float32 and "refused" in row:
                    continue  # only flex takes float32
                found.append(row)
                print_line(line(row))
    shape = f"{options.tokens:,} tokens in documents of {options.document:,}, {HEADS} heads of {DIM}, bfloat16"
    print_line(f"\nforward + backward, {shape}")
    times = timings(options.tokens, options.document, torch.bfloat16, options.repeats)
    for row in times:
        print_line(f"{row['backend']:<22}{row['ms']:10.3f} ms{row['times_faster']:10.1f}x")
    return found, times


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every backend that serves a case computes it within its bound."""
    options = arguments(argv)
    reason = missing_cuda((8, 0))
    if reason is not None:
        print(f"gpu_check {reason}: run it on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # the eager code's error is the yardstick: no TF32 in it
    found, times = report(lambda text: print(text, flush=True), options)
    failures = [row for row in found if not passed(row)]
    print(f"\n{len(found) - len(failures)} of {len(found)} rows passed or were refused by name")
    if options.out is not None:
        config = {"tokens": options.tokens, "document": options.document, "repeats": options.repeats}
        manifest = build_manifest("scripts/gpu_check.py", config)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, {"manifest": manifest, "errors": plain(found), "times": times})
        print(f"written to {options.out}")
    return 1 if failures else 0


def plain(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The error table as plain JSON."""
    fields = ("name", "error", "eager_error", "bound", "ok")
    return [
        row | {"deviations": [{f: getattr(d, f) for f in fields} for d in row["deviations"]]}
        if "deviations" in row
        else row
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
