"""What a step cost: rates, utilisation and memory, as one row of metrics."""

from __future__ import annotations

import resource
import sys
import time

import torch

from anchorctx.data.loader import Step
from anchorctx.flops import ModelFlops, peak_flops
from anchorctx.parallel.dist import Ranks

GIB = 2**30


class Meter:
    """Times training steps; time spent elsewhere (validation, checkpoints) is taken out by `pause` and `go`."""

    def __init__(self, flops: ModelFlops, ranks: Ranks) -> None:
        self._flops, self._ranks = flops, ranks
        name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
        self._peak = peak_flops(name)
        self.go()

    def go(self) -> None:
        """Start timing the next step."""
        self._start = time.perf_counter()

    def row(self, step: Step, data_seconds: float) -> dict[str, float]:
        """Metrics of the step that ends now."""
        seconds = time.perf_counter() - self._start
        rows = len(step.layouts)
        tokens = sum(layout.length for layout in step.layouts)
        row = {
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/data_seconds": data_seconds,
            "perf/attention_flops_saved": self._flops.attention_saved(step.layouts),
            "memory/peak_gib": peak_memory(self._ranks.device) / GIB,
            "data/documents_per_row": step.documents / rows,
            "data/trained_tokens_per_row": step.trained_tokens / rows,
            "data/long_documents": step.long_documents,
        }
        if self._peak is not None:
            # of the rows as they were packed: copies of the anchor are no use to anybody
            row["perf/mfu"] = self._flops.step(step.layouts) / seconds / (self._peak * self._ranks.world)
        self.go()
        return row


def peak_memory(device: torch.device) -> int:
    """Most bytes ever held: by torch on a GPU, by the process (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss is in KiB on Linux and in bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
