"""How documents are put into pieces, against plain loops written from the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorctx.pieces import TOKEN_COST, cut, deal, document_costs, shared_and_alone

many = settings(max_examples=150, deadline=None)
lengths = st.lists(st.integers(1, 60), max_size=25).map(lambda x: np.array(x, np.int64))


def plain_cut(tokens: list[int], costs: list[float], max_tokens: int, at_least: int) -> list[list[int]]:
    """Longest processing time first, looking at every piece for every document."""
    short = [length for length in tokens if length <= max_tokens]
    least = len(tokens) - len(short) + -(-sum(short) // max_tokens)
    count = max(least, at_least, 1)
    while True:
        pieces: list[list[int]] = [[] for _ in range(count)]
        for document in sorted(range(len(tokens)), key=lambda i: -costs[i]):
            held = [sum(tokens[i] for i in piece) for piece in pieces]
            fitting = [n for n in range(count) if not pieces[n] or held[n] + tokens[document] <= max_tokens]
            if not fitting:
                break
            pieces[min(fitting, key=lambda n: sum(costs[i] for i in pieces[n]))].append(document)
        else:
            pieces.sort(key=lambda piece: -sum(costs[i] for i in piece))
            return [sorted(piece, key=lambda i: -tokens[i]) for piece in pieces]
        count += 1


@many
@given(tokens=lengths, max_tokens=st.integers(1, 100), at_least=st.integers(1, 4), token_cost=st.integers(0, 50))
def test_pieces_are_those_of_the_plain_loop(
    tokens: np.ndarray, max_tokens: int, at_least: int, token_cost: int
) -> None:
    costs = document_costs(tokens, token_cost)
    found = [piece.tolist() for piece in cut(tokens, costs, max_tokens, at_least)]
    assert found == plain_cut(tokens.tolist(), costs.tolist(), max_tokens, at_least)
    assert found == [piece.tolist() for piece in cut(tokens, costs, max_tokens, at_least)]


@many
@given(tokens=lengths, max_tokens=st.integers(1, 100), at_least=st.integers(1, 4))
def test_every_document_is_in_one_piece_that_holds_it(tokens: np.ndarray, max_tokens: int, at_least: int) -> None:
    costs = document_costs(tokens)
    pieces = cut(tokens, costs, max_tokens, at_least)
    assert sorted(i for piece in pieces for i in piece.tolist()) == list(range(len(tokens)))
    assert len(pieces) >= at_least
    for piece in pieces:
        assert len(piece) <= 1 or tokens[piece].sum() <= max_tokens
        assert (np.diff(tokens[piece]) <= 0).all(), "the longest first, equal ones together"
        assert piece.dtype == np.int64
    prices = [costs[piece].sum() for piece in pieces]
    assert all(a >= b for a, b in zip(prices, prices[1:], strict=False)), "the costliest first, empty ones last"


@many
@given(tokens=lengths.filter(len), at_least=st.integers(1, 6))
def test_costs_are_even_where_all_documents_fit(tokens: np.ndarray, at_least: int) -> None:
    """Graham's bound on longest processing time first: the mean, and a share of the last document put."""
    costs = document_costs(tokens)
    pieces = cut(tokens, costs, int(tokens.sum()), at_least)
    assert len(pieces) == at_least
    largest = costs[pieces[0]].sum()
    last = costs[pieces[0]].min()
    assert largest <= costs.sum() / at_least + last * (1 - 1 / at_least) + 1e-6


def test_many_documents_are_cut_evenly() -> None:
    tokens = np.random.default_rng(0).lognormal(np.log(800), 1.2, 2000).astype(np.int64) + 1
    costs = document_costs(tokens)
    prices = np.array([costs[piece].sum() for piece in cut(tokens, costs, 2**18, 16)])
    assert len(prices) == 16 and prices.max() < 1.01 * prices.mean(), prices


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "at_least", "expected"),
    [
        ([5, 3, 3, 1], 6, 1, [[0, 3], [1, 2]]),
        ([2, 9, 2], 6, 1, [[1], [0, 2]]),  # longer than a piece: alone
        ([9, 2], 6, 4, [[0], [1], [], []]),  # fewer documents than processes: empty pieces
        ([], 6, 2, [[], []]),
        ([4, 4, 4], 7, 1, [[0], [1], [2]]),  # 12 tokens would fit into two pieces, their documents do not
    ],
)
def test_examples(tokens: list[int], max_tokens: int, at_least: int, expected: list[list[int]]) -> None:
    sizes = np.array(tokens, np.int64)
    pieces = cut(sizes, document_costs(sizes), max_tokens, at_least)
    assert [piece.tolist() for piece in pieces] == expected


def test_a_documents_cost_is_its_pairs_and_its_tokens() -> None:
    found = document_costs(np.array([1, 1024]))
    assert found.tolist() == [1 + TOKEN_COST, 524_800 + 1024 * TOKEN_COST]
    assert document_costs(np.array([4]), token_cost=0).tolist() == [10]


@many
@given(tokens=lengths, max_tokens=st.integers(1, 100), processes=st.integers(1, 5))
def test_every_process_gets_as_many_pieces_and_every_document_goes_to_one(
    tokens: np.ndarray, max_tokens: int, processes: int
) -> None:
    costs = document_costs(tokens)
    dealt = deal(tokens, costs, max_tokens, processes)
    assert len(dealt) == processes and len({len(pieces) for pieces in dealt}) == 1 and len(dealt[0]) >= 1
    assert sorted(i for pieces in dealt for piece in pieces for i in piece.tolist()) == list(range(len(tokens)))
    for pieces in dealt:
        assert all(len(piece) <= 1 or tokens[piece].sum() <= max_tokens for piece in pieces)
        prices = [costs[piece].sum() for piece in pieces]
        assert all(a >= b for a, b in zip(prices, prices[1:], strict=False))
    again = deal(tokens, costs, max_tokens, processes)
    assert [[p.tolist() for p in own] for own in again] == [[p.tolist() for p in own] for own in dealt]


def test_short_documents_make_up_for_a_long_one() -> None:
    tokens = np.array([15_000, *[500] * 500])
    costs = document_costs(tokens)
    each = [sum(costs[piece].sum() for piece in pieces) for pieces in deal(tokens, costs, 2**15, 8)]
    assert max(each) < 1.01 * np.mean(each)


def test_passes_that_are_needed_anyway_give_room_for_even_costs() -> None:
    # 386 tokens would fit two passes of 100 in each of two processes, but 80, 82 and 86 share with none of the others
    # but 13: it takes three. Their room lets costs be even; with the room of two they were 7,309 and 5,859.
    tokens = np.array([36, 80, 46, 13, 86, 82, 43])
    costs = document_costs(tokens, 0)
    dealt = deal(tokens, costs, 100, 2)
    assert [len(own) for own in dealt] == [3, 3]
    assert [sum(costs[piece].sum() for piece in own) for own in dealt] == [6643, 6525]


@pytest.mark.parametrize(("tokens", "count"), [(4500, 1864), (2800, 2800), (600, 2000)])
def test_documents_of_more_than_a_share_of_a_piece_are_cut_at_once(tokens: int, count: int) -> None:
    import anchorctx.pieces as module

    tried, fill = [], module._fill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_fill", lambda *args: tried.append(args[-1]) or fill(*args))
        lengths = np.full(count, tokens)
        pieces = cut(lengths, document_costs(lengths), 8192)
    assert len(tried) == 1 and len(pieces) == -(-count // (8192 // tokens))


def test_only_what_is_longer_than_a_piece_is_shared() -> None:
    def kinds(tokens: list[int], sequence: int) -> list[tuple[list[int], int]]:
        return [(chosen.tolist(), size) for chosen, size in shared_and_alone(np.array(tokens, int), 6, sequence)]

    assert kinds([5, 9, 2], 2) == [([1], 2), ([0, 2], 1)]
    assert kinds([5, 9, 2], 1) == [([0, 1, 2], 1)]
    assert kinds([9, 7], 2) == [([0, 1], 2)]
    assert kinds([], 2) == [([], 1)]  # nothing to train is an empty piece: a step needs one pass
