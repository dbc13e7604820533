"""Which documents one forward pass holds: whole documents cut into *pieces* of bounded tokens and of even cost.

Documents that see nobody else's tokens may be computed apart, in any order, and the sum of their losses and gradients
is the row's. So memory goes with the piece and not with the row. Pure arithmetic on lengths; no tensors, no layouts.
"""

from __future__ import annotations

import heapq

import numpy as np

TOKEN_COST = 16_384.0
"""What a token costs besides attention, in (query, key) pairs: about six times a model's width (12 w^2 weights a layer
at 6 operations, against 12 w operations a pair)."""


def document_costs(tokens: np.ndarray, token_cost: float = TOKEN_COST) -> np.ndarray:
    """(N,) float64 cost of computing documents of so many tokens (N,) each, in (query, key) pairs."""
    # 1,024 tokens are 524,800 pairs of causal attention and 1,024 * 16,384 pairs' worth of everything else
    return tokens * (tokens + 1) / 2 + tokens * token_cost


def cut(tokens: np.ndarray, costs: np.ndarray, max_tokens: int, count: int = 1) -> list[np.ndarray]:
    """Put documents into pieces of at most `max_tokens`, of about the same cost; one longer than that is alone.

    The costliest document goes first, each into the cheapest piece that has room (longest processing time first, Graham
    1969). Where that leaves a document without room, there is one piece more.

    Args:
        tokens: (N,) of each document.
        costs: (N,) of each document.
        max_tokens: that a piece holds.
        count: pieces, at least; they may be empty.

    Returns:
        Indices of documents for each piece, the longest document first; the costliest piece first.
    """
    count, order = max(_least_pieces(tokens, max_tokens), count), _costliest_first(costs)
    while (pieces := _fill(order, tokens, costs, max_tokens, count)) is None:
        count += 1
    return pieces


def deal(tokens: np.ndarray, costs: np.ndarray, max_tokens: int, processes: int) -> list[list[np.ndarray]]:
    """The pieces of each process: about the same cost, and the same number, for each; arguments as for `cut`.

    Documents are dealt to processes first, so that short ones make up for long ones, and then cut into pieces. The
    costliest pieces come first, so that what processes run at the same time costs about the same.
    """
    # 3 processes, pieces of 100 tokens, 650 tokens in all: at least 3 pieces each, so a process may have 300
    each, order = max(-(-int(tokens.sum()) // (max_tokens * processes)), 1), _costliest_first(costs)
    while True:
        shares = _fill(order, tokens, costs, each * max_tokens, processes)
        if shares is None:
            each += 1
            continue
        pieces = [cut(tokens[share], costs[share], max_tokens) for share in shares]
        most = max(len(own) for own in pieces)
        if most <= each:
            break
        each = most  # so many passes are needed anyway: their room serves the balance as well
    while most > min(len(own) for own in pieces):
        pieces = [cut(tokens[share], costs[share], max_tokens, most) for share in shares]
        most = max(len(own) for own in pieces)
    return [[share[piece] for piece in own] for share, own in zip(shares, pieces, strict=True)]


def shared_and_alone(tokens: np.ndarray, max_tokens: int, sequence: int) -> list[tuple[np.ndarray, int]]:
    """Which documents (N,) go through which passes: (indices, processes that share each) for one kind after the other.

    Those that are longer than a piece are shared by `sequence` processes, in passes of their own; all others are one
    process's. A kind without documents is left out, but for the last: with nothing to do there is one kind, empty.
    """
    # documents of 5, 9 and 2 tokens, pieces of 6, two processes that share: [([1], 2), ([0, 2], 1)]
    shared = (tokens > max_tokens) & (sequence > 1)
    kinds = [(np.flatnonzero(shared), sequence), (np.flatnonzero(~shared), 1)]
    return [kind for kind in kinds if len(kind[0])] or kinds[1:]


def _least_pieces(tokens: np.ndarray, max_tokens: int) -> int:
    """Pieces that documents of so many tokens (N,) take at least, 1 where there are none."""
    # 2,800 documents of 2,800 tokens in pieces of 8,192: 958 by their tokens, but only two fit into one, so 1,400.
    # Beginning there, nothing has to be tried hundreds of times.
    short = tokens[tokens <= max_tokens]
    least = -(-int(short.sum()) // max_tokens)
    for fit in range(1, 17):  # documents of more than a third of a piece: two fit
        least = max(least, -(-int(((fit + 1) * short > max_tokens).sum()) // fit))
    return max(len(tokens) - len(short) + least, 1)


def _costliest_first(costs: np.ndarray) -> list[int]:
    return np.argsort(-costs, kind="stable").tolist()


def _fill(
    order: list[int], tokens: np.ndarray, costs: np.ndarray, max_tokens: int, count: int
) -> list[np.ndarray] | None:
    """Documents of each of `count` groups, the costliest first; None where one finds no room."""
    # documents of 5, 3, 3 and 1 tokens into two pieces of 6: [5, 1] and [3, 3]
    sizes, prices = tokens.tolist(), costs.tolist()
    cheapest = [(0.0, number) for number in range(count)]  # a heap of those with room
    room, total = [max_tokens] * count, [0.0] * count
    members: list[list[int]] = [[] for _ in range(count)]
    for document in order:
        passed = []  # cheaper ones, but too full
        while cheapest:
            number = cheapest[0][1]
            if room[number] >= sizes[document] or not members[number]:
                break
            passed.append(heapq.heappop(cheapest))
        else:
            return None
        room[number] -= sizes[document]
        members[number].append(document)
        total[number] += prices[document]
        if room[number] > 0:
            heapq.heapreplace(cheapest, (total[number], number))
        else:
            heapq.heappop(cheapest)
        for entry in passed:
            heapq.heappush(cheapest, entry)
    numbers = sorted(range(count), key=lambda number: -total[number])
    return [np.array(sorted(members[n], key=lambda i: -sizes[i]), np.int64) for n in numbers]
