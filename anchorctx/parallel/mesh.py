"""DP x SP: which processes share a document that is longer than a piece.

Neighbours in rank share it, so that a group stays inside a machine where its exchanges are cheap:
rank = group * sequence + sequence_rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from anchorctx.errors import UserError
from anchorctx.parallel.dist import Ranks


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place in the mesh."""

    ranks: Ranks
    sequence: int
    """Processes that share each long document."""

    @classmethod
    def of(cls, ranks: Ranks, sequence: int) -> Mesh:
        """The mesh of all processes; UserError when `sequence` does not divide them."""
        check_mesh(ranks.world, sequence)
        return cls(ranks, sequence)

    @property
    def sequence_rank(self) -> int:
        """Which slice of a long document this process holds."""
        return self.ranks.rank % self.sequence


def check_mesh(world: int, sequence: int) -> None:
    """UserError when a sequence-parallel size does not divide the number of processes; names the nearest that does."""
    if sequence > world:
        raise UserError(
            f"parallel.sequence_parallel={sequence} needs at least as many processes, but there are {world}: "
            f"start {sequence}, or use {nearest(sequence, divisors(world))}"
        )
    if world % sequence:
        raise UserError(
            f"{world} processes do not divide into groups of parallel.sequence_parallel={sequence}: "
            f"use {nearest(sequence, divisors(world))}, or start {-(-world // sequence) * sequence} processes"
        )


def check_heads(heads: int, key_heads: int, sequence: int, world: int | None = None) -> None:
    """UserError when the heads cannot be shared by `sequence` processes; names the nearest number that can."""
    if heads % sequence == 0 and (key_heads % sequence == 0 or sequence % key_heads == 0):
        return
    # 32 heads and 8 key heads: 1, 2, 4, 8, 16 and 32 processes; beyond 8, key heads are replicated
    valid = [n for n in sequence_sizes(heads, key_heads) if world is None or world % n == 0]
    raise UserError(
        f"parallel.sequence_parallel={sequence} cannot share {heads} attention heads and {key_heads} key heads: "
        "it must divide the heads, and divide the key heads or be a multiple of them: "
        f"use {nearest(sequence, valid)} (possible: {', '.join(map(str, valid))})"
    )


def sequence_sizes(heads: int, key_heads: int) -> list[int]:
    """Numbers of processes that can share a model's heads; fewer key heads than processes are replicated."""
    return [n for n in divisors(heads) if key_heads % n == 0 or n % key_heads == 0]


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def nearest(wanted: int, valid: list[int]) -> int:
    """The valid number nearest to `wanted`; of two, the smaller."""
    return min(valid, key=lambda n: (abs(n - wanted), n))
