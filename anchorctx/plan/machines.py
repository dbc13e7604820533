"""GPUs that can be planned with: memory, and how fast they talk to each other."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from anchorctx.errors import UserError
from anchorctx.flops import PEAK_TFLOPS

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Machine:
    """One kind of GPU; the dense bfloat16 peak is that of `flops.PEAK_TFLOPS`."""

    name: str
    memory: float
    """Bytes that the driver shows as total."""
    link: float
    """Bytes a second that a GPU sends to the others of its machine (NVLink, else PCIe), one direction."""

    @property
    def peak(self) -> float:
        """FLOP/s."""
        return PEAK_TFLOPS[self.name] * 1e12


def _machine(name: str, gib: float, link_gb: float) -> Machine:
    return Machine(name, gib * GIB, link_gb * 1e9)


MACHINES = {
    machine.name: machine
    for machine in (
        _machine("A100", 80.0, 300),
        _machine("A800", 80.0, 200),
        _machine("H100", 79.6, 450),
        _machine("H800", 79.6, 200),
        _machine("H200", 140.4, 450),
        _machine("B200", 179.0, 900),
        _machine("L40S", 45.0, 25),
        _machine("A40", 45.0, 25),
        _machine("A10G", 22.5, 12),
        _machine("RTX 4090", 24.0, 25),
        _machine("RTX 3090", 24.0, 25),
    )
}
"""By name. Memory as nvidia-smi shows it, links from the vendors' data sheets (half of a bidirectional figure)."""


def machine(name: str) -> Machine:
    """The GPU of that name; UserError names the nearest."""
    if name not in MACHINES:
        near = difflib.get_close_matches(name.upper(), MACHINES, 1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"gpu={name} is not known: {hint}choose {', '.join(MACHINES)}; gpu_memory_gib= changes its memory"
        )
    return MACHINES[name]
