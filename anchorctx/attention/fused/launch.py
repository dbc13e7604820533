"""Where the fused kernels can be launched."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging

import torch

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)
def _installed() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.info("no triton is installed: torch's operators rotate in float32, and merge a shared anchor")
    return found


def serves(*tensors: torch.Tensor) -> bool:
    """Can a kernel be launched on these? They lie on one card and have values: none is fake, meta, or being traced."""
    return (
        all(type(x) is torch.Tensor and x.device.type == "cuda" for x in tensors)
        and len({x.device for x in tensors}) == 1
        and not torch.compiler.is_compiling()
        and _installed()
    )


def launched_on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Inside, kernels run on the tensor's card: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
