"""Training that computes the same bits each time, on the same cards with the same software.

On a CPU it does so anyway. On CUDA three things do not: FlashAttention's backward pass adds up the queries' gradients
in the order in which its blocks come (atomics), cuBLAS may choose by its free workspace, and some of torch's own
operators use atomics too. torch's switch mends all three or raises an error that names the operator; aten's attention
and `attention.kernels.flash_attn` read it. NCCL repeats its sums as long as processes and links stay the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from anchorctx.errors import UserError

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""With which cuBLAS is deterministic (its manual, "Results Reproducibility"): 8 buffers of so many KiB."""


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch computes the same bits each time, if `wanted`; before the process's first use of cuBLAS.

    Raises:
        UserError: the environment gives cuBLAS a workspace with which it cannot.
    """
    if not wanted:
        yield
        return
    if os.environ.setdefault(VARIABLE, WORKSPACES[0]) not in WORKSPACES:
        raise UserError(
            f"deterministic=true cannot be with {VARIABLE}={os.environ[VARIABLE]}: unset it, or use "
            f"{' or '.join(WORKSPACES)}"
        )
    # Filling what torch.empty gives costs a pass over memory, for code that reads what it has not written: none here.
    switch: Any = torch.utils.deterministic
    filling = switch.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switch.fill_uninitialized_memory = filling
