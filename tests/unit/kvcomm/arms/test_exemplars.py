from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from anchorctx.errors import UserError
from anchorctx.kvcomm.agents import Ids
from anchorctx.kvcomm.arms.exemplars import Content, Exemplar, Offset
from anchorctx.kvcomm.arms.names import Feature, Reduce
from anchorctx.kvcomm.arms.pool import Pool, PoolConfig
from anchorctx.kvcomm.cache import KV

LAYERS, HEADS, DIM = 3, 2, 4
READER = ("m", 0)


def embed(ids: Ids) -> torch.Tensor:
    """On a line: the distance of two contents is the norm of their difference."""
    return torch.tensor(ids).float()[:, None]


def content(*ids: int, by: Callable[[Ids], torch.Tensor] = embed, base: KV | None = None) -> Content:
    def of() -> KV:
        assert base is not None, "nobody should ask for it"
        return base

    return Content(ids, by, of)


def kv(length: int, fill: float = 0.0) -> KV:
    shape = (LAYERS - 1, 1, HEADS, length, DIM)
    return KV(torch.full(shape, fill), torch.full(shape, fill))


def pool(**settings: Any) -> Pool:
    return Pool(PoolConfig(**({"min_exemplars": 1} | settings)))


def add(found: Pool, request: int, ids: list[int], glue: int = 0) -> None:
    offset = Offset(kv(len(ids)), kv(glue) if glue else None, tuple(range(glue)))
    found.add("x", request, tuple(ids), READER, offset)


def requests(found: Pool) -> list[int]:
    return [exemplar.request for exemplar in found.held("x")]


def test_weights_are_a_softmax_of_distances_and_the_gate_is_entropy() -> None:
    found = pool(gamma=1.0)
    add(found, 0, [10, 0, 7])
    add(found, 1, [13, 4, 7])
    match = found.match("x", READER, content(10, 1))
    assert match is not None
    expected = torch.softmax(torch.tensor([-1.0, -((3**2 + 3**2) ** 0.5)]), 0)
    assert match.weights == pytest.approx(expected.tolist())
    entropy = -sum(w * math.log(w) for w in match.weights) / math.log(2)
    for gamma, shared in ((entropy * 0.99, False), (entropy * 1.01, True)):
        gated = pool(gamma=gamma)
        gated._held = found._held
        assert (gated.match("x", READER, content(10, 1)) is not None) is shared


def test_a_requests_distances_are_measured_once_for_all_readers() -> None:
    found, other = pool(gamma=1.0), ("other", 0)
    for request, ids in enumerate(([10, 0, 7], [13, 4, 7])):
        add(found, request, ids)
        found.add("x", request, tuple(ids), other, Offset(kv(3)))
    known: dict[tuple[str, int], float] = {}
    asked: list[Ids] = []

    def counted(ids: Ids) -> torch.Tensor:
        asked.append(ids)
        return embed(ids)

    first = found.match("x", READER, content(9, 1, by=counted), known)
    assert known == pytest.approx({("x", 0): 2**0.5, ("x", 1): 5.0}) and len(asked) == 3
    add(found, 2, [9, 4])
    again = found.match("x", other, content(9, 1, by=counted), known)
    assert first is not None and again is not None and again.weights == first.weights and len(asked) == 3
    third = found.match("x", READER, content(9, 1, by=counted), known)  # the new exemplar's alone is measured
    assert third is not None and known["x", 2] == 3.0 and len(asked) == 5


def test_a_content_longer_than_every_exemplar_is_stored() -> None:
    found = pool(gamma=1.0)
    add(found, 0, [1, 2, 3])
    assert found.match("x", READER, content(1, 2, 3, 4)) is None
    assert found.match("x", READER, content(1, 2, 3)) is not None
    assert found.match("x", ("other", 0), content(1)) is None
    assert found.match("y", READER, content(1)) is None


def test_too_few_exemplars_share_nothing() -> None:
    found = pool(min_exemplars=2, gamma=1.0)
    add(found, 0, [1])
    assert found.match("x", READER, content(2)) is None
    add(found, 1, [3])
    assert found.match("x", READER, content(2)) is not None


def test_equal_contents_are_one_exemplar_and_always_shared() -> None:
    found = pool(gamma=0.0, min_exemplars=20)
    shared = []
    for request in range(25):
        match = found.match("x", READER, content(1, 2, 3))
        shared.append(match is not None)
        if match is None:
            add(found, request, [1, 2, 3])
    assert shared == [False] + [True] * 24
    (exemplar,) = found.held("x")
    assert exemplar.uses == 24
    add(found, 30, [1, 2, 3])  # observed again, by a session that did not ask
    assert requests(found) == [0]


def test_a_content_that_an_exemplar_begins_with_is_shared_from_the_shortest() -> None:
    found = pool(gamma=0.0, min_exemplars=20)
    add(found, 0, [1, 2, 3, 4])
    add(found, 1, [1, 2, 3])
    match = found.match("x", READER, content(1, 2))
    assert match is not None and match.weights == (1.0,) and match.offsets[0].text.length == 3
    assert found.match("x", READER, content(1, 3)) is None


def base(*values: float, keys: float = 0.0) -> KV:
    """One token a value, all layers, heads and dimensions alike."""
    one = torch.tensor(values)[:, None].expand(LAYERS, 1, HEADS, len(values), DIM)
    return KV(torch.full_like(one, keys), one)


NUMBERS = LAYERS * HEADS * DIM


@pytest.mark.parametrize(
    ("h", "distance"), [(Feature.values, (NUMBERS * 0.02) ** 0.5), (Feature.keys_values, (NUMBERS * 1.02) ** 0.5)]
)
def test_contents_are_compared_by_their_base_kv(h: Feature, distance: float) -> None:
    found = pool(gamma=1.0, min_exemplars=2, h=h)
    for request, (ids, kept) in enumerate([((1, 2), base(0.0, 0.0)), ((3, 4), base(0.1, 0.1, keys=0.5**0.5))]):
        found.add("x", request, ids, READER, Offset(kv(2)), lambda kept=kept: kept)
    known: dict[tuple[str, int], float] = {}
    assert found.match("x", READER, content(5, 6, base=base(0.0, 0.0)), known) is not None
    assert known["x", 0] == 0.0 and known["x", 1] == pytest.approx(distance)
    assert found.nbytes == 2 * (8 * 2 + 2 * 2 * (LAYERS - 1) * HEADS * DIM * 4 + 2 * 2 * NUMBERS * 4)


def test_each_token_has_weights_of_its_own() -> None:
    found = pool(gamma=1.0, min_exemplars=2, h=Feature.values, reduce=Reduce.per_token)
    for request, (ids, kept) in enumerate([((1, 2), base(0.0, 3.0)), ((3, 4), base(1.0, 0.0))]):
        found.add("x", request, ids, READER, Offset(kv(2)), lambda kept=kept: kept)
    match = found.match("x", READER, content(5, 6, base=base(0.0, 0.0)))
    assert match is not None and match.by_token is not None
    expected = torch.softmax(-torch.tensor([[0.0, 3.0], [1.0, 0.0]]), 0)
    assert torch.allclose(match.by_token, expected)
    assert match.weights == pytest.approx(torch.softmax(torch.tensor([-1.5, -0.5]), 0).tolist())


def test_the_weights_may_compare_something_else_than_the_rule() -> None:
    found = pool(gamma=1.0, min_exemplars=2, weights_h=Feature.values)
    for request, (ids, kept) in enumerate([((1,), base(0.0)), ((9,), base(0.1))]):
        found.add("x", request, ids, READER, Offset(kv(1)), lambda kept=kept: kept)
    match = found.match("x", READER, content(2, base=base(0.0)))
    expected = torch.softmax(torch.tensor([0.0, -0.1 * NUMBERS**0.5]), 0)
    assert match is not None and match.weights == pytest.approx(expected.tolist())


def test_negligible_weights_are_not_read() -> None:
    found = pool()
    add(found, 0, [0])
    add(found, 1, [100])
    match = found.match("x", READER, content(1))
    assert match is not None and len(match.offsets) == 1 and match.weights == (1.0,)


def test_the_least_used_of_the_oldest_goes_first_and_the_bound_holds_all_along() -> None:
    found = pool(max_exemplars=4, window=2, gamma=1.0)
    for request in range(4):
        add(found, request, [100 * request])
    found.match("x", READER, content(0))
    add(found, 4, [400])  # of 0 (used) and 1, the unused one goes
    assert requests(found) == [0, 2, 3, 4]
    add(found, 5, [500])
    assert requests(found) == [0, 3, 4, 5]
    found.match("x", READER, content(300))
    add(found, 6, [600])  # 0 and 3 used once each: the older goes
    assert requests(found) == [3, 4, 5, 6]


@pytest.mark.parametrize("setting", [{"max_bytes": 0}, {"max_bytes": -1}, {"gamma": math.nan}, {"temperature": 0.0}])
def test_bounds_that_are_none_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        PoolConfig(**setting)  # type: ignore[arg-type]


def test_a_content_said_again_replaces_its_exemplar() -> None:
    found = pool(gamma=1.0)
    add(found, 0, [1, 2, 3])
    add(found, 0, [4, 5])
    (exemplar,) = found.held("x")
    assert exemplar.ids == (4, 5) and exemplar.offsets[READER].text.length == 2


def test_several_readers_share_an_exemplar() -> None:
    found = pool()
    add(found, 0, [1, 2])
    found.add("x", 0, (1, 2), ("n", 0), Offset(kv(2)))
    assert requests(found) == [0] and set(found.held("x")[0].offsets) == {READER, ("n", 0)}


@pytest.mark.parametrize("glues", [[5], [5, 0, 9]])
def test_memory_is_the_formula(glues: list[int]) -> None:
    found = pool()
    for i, glue in enumerate(glues):
        offset = Offset(kv(12), kv(glue) if glue else None)
        found.add("x", 0, (0,) * 12, (str(i), 0), offset)
    # the formula of the module's docstring, float32: ids, then text and glue for each reader, but for layer 0
    tokens = sum(12 + glue for glue in glues)
    assert found.nbytes == 8 * 12 + tokens * 2 * (LAYERS - 1) * HEADS * DIM * 4


def test_bytes_are_bounded_over_all_placeholders() -> None:
    one = Exemplar(0, (0,) * 4, {READER: Offset(kv(4))}).nbytes
    found = pool(max_bytes=2 * one)
    for request, name in enumerate(["x", "y", "x"]):
        found.add(name, request, (request,) * 4, READER, Offset(kv(4)))
        assert found.nbytes <= 2 * one
    assert requests(found) == [2] and [e.request for e in found.held("y")] == [1]
    add(found, 9, [0] * 40)  # alone larger than the bound
    assert found.nbytes == 0 and not list(found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -1.0}, "kvcomm gamma=-1.0 must be a finite number of at least 0: correct it, or leave it out"),
        ({"gamma": math.inf}, "gamma=inf must be a finite number of at least 0"),
        ({"temperature": math.nan}, "temperature=nan must be a finite number of at least 1e-09"),
        ({"max_exemplars": 0}, "max_exemplars=0 must be a whole number of at least 1"),
        ({"window": 2.5}, "window=2.5 must be a whole number of at least 1"),
        ({"max_bytes": 0}, "max_bytes=0 must be a whole number of at least 1"),
        ({"h": "words"}, "kvcomm h='words' must be one of embeddings, values, keys_values: correct it"),
        ({"h": None}, "h=None must be one of embeddings, values, keys_values"),
        ({"weights_h": "keys"}, "weights_h='keys' must be one of embeddings, values, keys_values"),
        ({"reduce": "mean"}, "reduce='mean' must be one of frobenius, per_token"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"min_exemplars": 30}, "min_exemplars=30 must not exceed max_exemplars=20"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PoolConfig(**settings)  # type: ignore[arg-type]


def test_choices_may_be_plain_text() -> None:
    """What decides and weighs is compared by identity, so that text must become one of the choices."""
    plain = PoolConfig(h="values", weights_h="keys_values", reduce="per_token")  # type: ignore[arg-type]
    assert (plain.h, plain.weights_h, plain.reduce) == (Feature.values, Feature.keys_values, Reduce.per_token)
    assert plain.h is Feature.values and plain.weights_h is Feature.keys_values and plain.reduce is Reduce.per_token
    assert PoolConfig(weights_h=None).weights_h is None
