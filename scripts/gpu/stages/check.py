"""Versions, what the card reaches in copies and products, and every attention backend against a float64 reference.

A backend passes a case when its largest error, in the output and in each gradient, is at most twice that of plain eager
code in the same dtype (`anchorctx.testing.numerics`).
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from anchorctx.attention import BACKENDS, attend
from anchorctx.attention.kernels import flash_attn
from anchorctx.attention.kernels.base import Score
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.testing.numerics import Attention, deviations
from stages.stage import Stage, median_ms

HEADS, DIM = 8, 64
TOKENS = 1000
"""Of a row: no multiple of any block size."""
PUBLIC = "flash_attn public"
"""flash-attn's public function over gathered keys: an independent second way, not a backend."""
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
REHEARSED = ("batch of 2", "window", "sinks", "wider values")
COMPILE_SECONDS = 15.0
"""FlexAttention compiles once for each kind of call."""


@dataclass(frozen=True)
class Case:
    """One line of the error table."""

    name: str
    layouts: tuple[PackedLayout, ...]
    score: Score = Score(DIM**-0.5)
    kv_heads: int = HEADS
    value_dim: int = DIM
    sinks: bool = False


def run(stage: Stage) -> None:
    """FlexAttention comes last: a kernel's cases take seconds, its own minutes to compile."""
    stage.measure("versions", versions)
    stage.measure("ceilings", lambda: ceilings(stage.device, stage.tiny))
    if stage.device.type == "cuda":  # the eager code's error is the yardstick: no TF32 in it
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    chosen = [
        case for case in cases() if not stage.tiny or case.name in ("batch of 2", "window", "sinks", "wider values")
    ]
    for name in sorted(backends(stage.device), key=lambda name: name == "flex"):
        missing = BACKENDS[name].missing() if name in BACKENDS else flash_attn.missing()
        if missing is not None:
            stage.row("errors", {"backend": name, "refused": missing})
            continue
        for dtype in served(name, stage.tiny):
            for case in chosen:
                if name == PUBLIC and not gathers(case):
                    continue
                stage.measure(
                    "errors",
                    lambda name=name, case=case, dtype=dtype: errors(name, case, dtype, stage.device),
                    needs=COMPILE_SECONDS if name == "flex" else 0.0,
                    backend=name,
                    dtype=str(dtype).removeprefix("torch."),
                    case=case.name,
                )


def versions() -> Mapping[str, object]:
    """Packages that the manifest has not, and the card as its driver sees it."""
    found: dict[str, object] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "flash-attn", "liger-kernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,memory.total,driver_version,power.limit"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        found["card"] = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    return found


def ceilings(device: torch.device, tiny: bool) -> Mapping[str, object]:
    """Bytes a second of a large copy (read and written), FLOP a second of a large product in bfloat16."""
    size, width = (2**10, 64) if tiny else (2**30, 8192)
    source, target = (torch.zeros(size, device=device) for _ in range(2))
    copy = median_ms(lambda: target.copy_(source), device, 9)
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: a @ b, device, 9)
    return {"copy, GB/s": 8 * size / copy / 1e6, "bfloat16 product, TFLOP/s": 2 * width**3 / product / 1e9}


def cases() -> list[Case]:
    """Layouts of every pattern, and everything else that a backend may compute differently."""
    row = PackedLayout((0, 1, 2, 301, 429, 700, TOKENS), 1)
    other = PackedLayout((0, 1, 500, 501, TOKENS), 1)
    interleaved = PackedLayout(row.doc_offsets, 1, doc_ids=(9, 1, 2, 1, 3, 2))
    patterns = (Pattern.full, Pattern.intra_doc, Pattern.anchor)
    anchor = Case("batch of 2", (row, other))
    return [
        *(Case(pattern.value, (pattern.apply(row),)) for pattern in patterns),
        Case("copies", (row.with_copies()[0],)),
        anchor,
        Case("anchor of 4", (PackedLayout((0, 4, 5, 300, TOKENS), 4),)),
        Case("interleaved", (interleaved,)),
        replace(anchor, name="grouped heads", kv_heads=2),
        replace(anchor, name="window", score=Score(DIM**-0.5, window=100)),
        replace(anchor, name="softcap", score=Score(DIM**-0.5, softcap=20.0)),
        replace(anchor, name="sinks", kv_heads=2, sinks=True),
        replace(anchor, name="sinks, window", score=Score(DIM**-0.5, window=100), sinks=True),
        replace(anchor, name="wider values", value_dim=2 * DIM),
        replace(anchor, name="narrower values", value_dim=DIM // 2),
        Case("2,000 tiny documents", (PackedLayout((0, 1, *range(2, 2 * TOKENS + 1)), 1),)),
    ]


def backends(device: torch.device) -> list[str]:
    """Names of what computes cases there: each backend but the reference, and flash-attn's public function."""
    found = [name for name, backend in BACKENDS.items() if device.type in backend.devices and name != "reference"]
    return found + ([PUBLIC] if device.type == "cuda" and flash_attn.missing() is None else [])


def served(name: str, tiny: bool) -> list[torch.dtype]:
    """The dtypes to check a backend in; a rehearsal checks one."""
    takes = BACKENDS["flash_attn" if name == PUBLIC else name].dtypes
    return [dtype for dtype in DTYPES if dtype in takes and (not tiny or dtype is torch.float32)]


def gathers(case: Case) -> bool:
    """Can the public function compute the case?"""
    plain = case.score.window is None and not case.sinks and case.value_dim == DIM
    return plain and all(layout.doc_ids is None for layout in case.layouts)


def attention(name: str, case: Case) -> Attention:
    """What computes the case, as a function of query, key and value, and of sinks where it has them."""
    score = case.score
    if name == PUBLIC:
        return lambda q, k, v: flash_attn.gathered_attention(q, k, v, case.layouts, score)
    options = {"scale": score.scale, "window": score.window, "softcap": score.softcap, "backend": name}
    return lambda q, k, v, sinks=None: attend(q, k, v, case.layouts, sinks=sinks, **options)


def errors(name: str, case: Case, dtype: torch.dtype, device: torch.device) -> Mapping[str, object]:
    """Largest error of each tensor, the worst of them as a share of its bound, and whether all are within theirs."""
    found = deviations(attention(name, case), tensors(case, dtype, device), case.layouts, case.score)
    worst = max(deviation.error / max(deviation.bound, 1e-300) for deviation in found)
    of_tensor = {deviation.name: deviation.error for deviation in found}
    return {**of_tensor, "of bound": worst, "ok": all(deviation.ok for deviation in found)}


def tensors(case: Case, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Seeded query, key, value, sinks (H,) where the case has them, and output gradient.

    (B, H, T, D), in memory as projections leave them: (B, T, H, D).
    """
    generator = torch.Generator(device).manual_seed(0)
    heads = ((HEADS, DIM), (case.kv_heads, DIM), (case.kv_heads, case.value_dim), (HEADS, case.value_dim))
    shapes = [(len(case.layouts), case.layouts[0].length, *own) for own in heads]
    made = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
    *inputs, gradient = (x.transpose(1, 2) for x in made)
    sinks = [torch.linspace(-2, 3, HEADS, device=device)] if case.sinks else []
    return [*inputs, *sinks, gradient]
