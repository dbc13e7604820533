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


def cut(tokens: np.ndarray, costs: np.ndarray, max_tokens: int, multiple: int = 1) -> list[np.ndarray]:
    """Put documents into pieces of at most `max_tokens`, of about the same cost; one longer than that is alone.

    The costliest document goes first, each into the cheapest piece that has room (longest processing time first, Graham
    1969). Where that leaves a document without room, there are `multiple` pieces more.

    Args:
        tokens: (N,) of each document.
        costs: (N,) of each document.
        max_tokens: that a piece holds.
        multiple: the number of pieces is a multiple of this, and at least this; pieces may be empty.

    Returns:
        Indices of documents for each piece, the longest document first; the costliest piece first.
    """
    alone = int((tokens > max_tokens).sum())
    together = -(-int(tokens[tokens <= max_tokens].sum()) // max_tokens)
    # 5 pieces for 4 processes are 8
    count = max(-(-(alone + together) // multiple), 1) * multiple
    order = np.argsort(-costs, kind="stable").tolist()
    sizes, prices = tokens.tolist(), costs.tolist()
    while (pieces := _fill(order, sizes, prices, max_tokens, count)) is None:
        count += multiple
    pieces.sort(key=lambda piece: -piece[0])
    return [np.array(sorted(members, key=lambda i: -sizes[i]), np.int64) for _, members in pieces]


def _fill(
    order: list[int], tokens: list[int], costs: list[float], max_tokens: int, count: int
) -> list[tuple[float, list[int]]] | None:
    """(cost, documents) of each of `count` pieces; None where a document finds no room."""
    # documents of 5, 3, 3 and 1 tokens into two pieces of 6: [5, 1] and [3, 3]
    open_pieces = [(0.0, number) for number in range(count)]  # a heap, the cheapest first
    room, members = [max_tokens] * count, [[] for _ in range(count)]
    total = [0.0] * count
    for document in order:
        passed = []  # cheaper pieces without room
        while open_pieces:
            number = open_pieces[0][1]
            if room[number] >= tokens[document] or not members[number]:
                break
            passed.append(heapq.heappop(open_pieces))
        else:
            return None
        room[number] -= tokens[document]
        members[number].append(document)
        total[number] += costs[document]
        if room[number] > 0:
            heapq.heapreplace(open_pieces, (total[number], number))
        else:
            heapq.heappop(open_pieces)
        for entry in passed:
            heapq.heappush(open_pieces, entry)
    return list(zip(total, members, strict=True))
