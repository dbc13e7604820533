"""What a user says about processes: ZeRO and sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from anchorctx.errors import UserError
from anchorctx.settings import PositiveFloat, check_ranges

BUCKET = 50_000_000
"""Weights whose gradients are reduced, or that are gathered, in one call: 100 MB in bfloat16. DeepSpeed's own 5e8 holds
1 GB twice."""
LIVE = 500_000_000
"""Weights that ZeRO 3 keeps gathered at once, at most, beside the module that runs; DeepSpeed's own is 1e9."""
SUBGROUP = 250_000_000
"""Weights that the optimizer updates at once under ZeRO 3."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How the model's states are spread over processes (ZeRO, arXiv 1910.02054) and memory."""

    zero_stage: Annotated[int, Ge(1), Le(3)] = 2
    """1 shards the optimizer's states over the processes, 2 also the gradients, 3 also the parameters. 2 and 3 sum the
    gradients of micro-batches in float32, 1 in the weights' dtype."""
    sequence_parallel: Annotated[int, Ge(1), "1 is none"] = 1
    """Processes that share each document which is longer than a piece (DeepSpeed-Ulysses, 2309.14509): a divisor of the
    number of processes and of the attention heads. 1 is none."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in CPU memory."""
    offload_parameters: bool = False
    """Keep the parameters in CPU memory between uses; needs zero_stage=3."""
    timeout_s: PositiveFloat = 1800.0
    """Longest time, in seconds, that a process waits for another before the job ends, and says for which."""

    def validate(self) -> None:
        """Raise UserError for combinations that do not exist."""
        check_ranges(self, "parallel")
        if self.offload_parameters and self.zero_stage != 3:
            raise UserError(
                f"parallel.offload_parameters=true needs parallel.zero_stage=3, not {self.zero_stage}: "
                "only ZeRO 3 shards parameters"
            )
