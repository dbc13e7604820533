"""`anchorctx doctor`: what is installed, which attention backends work here, and how to get the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator

from anchorctx.cli.main import Arguments
from anchorctx.errors import UserError
from anchorctx.records.table import text_table

REQUIRED = ("torch", "transformers", "deepspeed", "datasets", "hydra-core", "safetensors", "numpy", "matplotlib")
OPTIONAL = {
    "zstandard": ("reads .jsonl.zst", "anchorctx[zstd]"),
    "wandb": ("logs to Weights & Biases", "anchorctx[wandb]"),
    "flash-attn": ("the flash_attn backend on CUDA", "anchorctx[flash]"),
    "lm-eval": ("RULER and other tasks", "anchorctx[eval]"),
    "liger-kernel": ("fused loss on CUDA", "anchorctx[liger]"),
}


FAILS = "FAILS: "
"""How a backend's line begins that says it can serve a call, and does not."""


def run(arguments: Arguments) -> int:
    """Print the report; it takes no configuration. Returns the exit code: 1 where a backend fails."""
    if arguments.help:
        print(__doc__)
        return 0
    if arguments.overrides or arguments.recipe or arguments.show:
        raise UserError(f"takes no arguments, got {' '.join(arguments.overrides) or 'options'}")
    backends = list(_backends())
    print("\n".join(text_table([*_machine(), "", *_packages(), "", *backends], indent=2)))
    return int(any(line[1].startswith(FAILS) for line in backends if isinstance(line, tuple)))


def _machine() -> Iterator[str | tuple[str, str]]:
    """A heading, then names and what there is; so are the other two sections."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    compiler = shutil.which("g++") or "not found: DeepSpeed needs it for optimizer offload"
    yield "machine"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "cpu", f"{os.cpu_count()} cores, {memory:.0f} GiB"
    yield "gpu", ", ".join(gpus) or "none: training runs on the CPU, in float32"
    yield "g++", compiler


def _packages() -> Iterator[str | tuple[str, str]]:
    yield "packages"
    for name in REQUIRED:
        yield name, _version(name) or "MISSING: pip install anchorctx"
    for name, (purpose, extra) in OPTIONAL.items():
        yield name, _version(name) or f"not installed ({purpose}): pip install {extra!r}"


def _backends() -> Iterator[str | tuple[str, str]]:
    """Each backend is really called, forward and backward, on this machine's device."""
    import torch

    from anchorctx.attention import BACKENDS, attend
    from anchorctx.attention.kernels.base import Score
    from anchorctx.layout import PackedLayout

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    yield f"attention backends on {device.type}, {str(dtype).removeprefix('torch.')}"
    query = torch.randn(1, 4, 256, 64, device=device, dtype=dtype, requires_grad=True)
    layout = PackedLayout((0, 1, 100, 256), anchor_len=1)  # the anchor, then documents of 99 and 156 tokens
    for name, backend in BACKENDS.items():
        try:
            refusal = backend.refusal(query, Score(0.125))
            if refusal is None:
                attend(query, query, query, [layout], backend=name).sum().backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()  # a kernel's failure is told only then
        except Exception as error:  # whatever a package or a compiler raises: the others are still to be told of
            yield name, f"{FAILS}{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        yield name, f"no: it {refusal}" if refusal else f"works: {backend.summary}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
