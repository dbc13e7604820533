"""The identities that KV reuse rests on, in float64 to 1e-10, for three architectures and four RoPE variants.

Measured over all cases: the largest deviation from an exact value is below 2e-14; 1e-10 leaves room for other CPUs.
What is *not* exact is tested too: an identity that held for everything would show nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from anchorctx.kvcomm import grouped
from anchorctx.kvcomm.agents import Frame, Ids, Template
from anchorctx.kvcomm.arms.basic import Anchored, Arm, Dense, DensePrefixCache, Naive, Rotate, RotateFirst, RotateGlue
from anchorctx.kvcomm.arms.blend import Blend
from anchorctx.kvcomm.arms.offsets import Kvcomm, MeanOffset
from anchorctx.kvcomm.arms.pool import PoolConfig
from anchorctx.kvcomm.cache import KV, concatenate
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.kvcomm.request import Prefixes, RequestState, TurnContext
from anchorctx.kvcomm.turn import Prefill, keep_message, prefill, recite
from anchorctx.layout import PackedLayout
from anchorctx.models import RopeConfig, RopeType
from anchorctx.testing.numerics import max_error
from anchorctx.testing.tiny import ARCHITECTURES, true_float64

EXACT = 1e-10
BOS = 1
TEMPLATE = Template.parse("ab{x}cd{y}{x}ef")
"""Neighbouring placeholders, and one that stands twice."""
X: Ids = (20, 31, 42, 53, 64, 75)
Y: Ids = (9, 8, 7)
MODELS = [
    ("llama", RopeType.default),
    ("llama", RopeType.linear),
    ("llama", RopeType.yarn),
    ("llama", RopeType.llama3),
    ("qwen2", RopeType.default),
    ("qwen2", RopeType.yarn),
    ("mistral", RopeType.default),
    ("mistral", RopeType.llama3),
]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with true_float64(), torch.no_grad():
        yield


@pytest.fixture(params=MODELS, ids=lambda p: f"{p[0]}-{p[1].value}")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    name, kind = request.param
    rope = RopeConfig() if kind is RopeType.default else RopeConfig(type=kind, factor=4.0)
    found = ARCHITECTURES[name].build(torch.float64, rope=rope)
    found.set_attn_implementation("sdpa")
    return found.eval()


@pytest.fixture
def decoder(model: PreTrainedModel) -> Decoder:
    return Decoder(model)


def encode(text: str) -> Ids:
    return tuple(ord(c) % 90 + 3 for c in text)


def context(decoder: Decoder, contents: dict[str, Ids], template: Template = TEMPLATE, number: int = 0) -> TurnContext:
    frame = Frame("agent", template, encode, BOS)
    return TurnContext(
        decoder, frame.prompt(contents), frame, RequestState(number, dict(contents)), Prefixes(decoder, BOS, (5, 6))
    )


def dense_logits(decoder: Decoder, ids: Ids) -> torch.Tensor:
    """(T, V), by the model alone."""
    return decoder.model(input_ids=decoder.tensor(ids), use_cache=False).logits[0]


def whole(found: Prefill, length: int) -> KV:
    return found.buffer.kv(0, length)


def error(a: KV, b: KV) -> float:
    return max(max_error(a.keys, b.keys), max_error(a.values, b.values))


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


# -- cache algebra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_unrotating_undoes_the_models_own_rotation(decoder: Decoder, batch: int) -> None:
    ids = random_ids(batch, 12)
    kv = decoder.encode(ids, position=100)
    plain = decoder.rope.unrotated(kv)
    assert error(decoder.rope.rotated(plain, 100), kv) < EXACT
    there_and_back = decoder.rope.rotated(decoder.rope.rotated(plain, 7), 100)
    assert error(there_and_back, kv) < EXACT
    # Layer 0 knows no context: moving it by our rotation is what the model itself computes there.
    moved = decoder.encode(ids, position=31)
    assert max_error(decoder.rope.rotated(plain, 31).keys[0], moved.keys[0]) < EXACT
    assert max_error(moved.keys[0], kv.keys[0]) > 0.01


def test_cut_and_concatenate_are_inverse(decoder: Decoder) -> None:
    kv = decoder.encode(random_ids(2, 12))
    assert error(concatenate([kv.cut(0, 5), kv.cut(5, 5), kv.cut(5)]), kv) == 0.0
    assert kv.cut(3, 8).rotated_at == 3 and kv.cut(-2).length == 2


def test_a_spliced_true_cache_equals_dense(decoder: Decoder) -> None:
    """Scattered holes in a true cache, filled by one forward: logits and cache are the dense ones."""
    ids = random_ids(2, 30)
    buffer = decoder.buffer(30, 2)
    expected = decoder.forward(ids, buffer, range(30), keep=30)
    assert max_error(expected, decoder.model(input_ids=ids, use_cache=False).logits) < EXACT
    holes = torch.tensor([1, 2, 9, 17, 28, 29])
    torn = decoder.buffer(30, 2)
    torn.keys.copy_(buffer.keys)
    torn.values.copy_(buffer.values)
    torn.keys[:, :, :, holes] = torn.values[:, :, :, holes] = 1e3
    found = decoder.forward(ids[:, holes], torn, holes, keep=len(holes))
    assert max_error(found, expected[:, holes]) < EXACT
    assert error(torn.kv(0, 30), buffer.kv(0, 30)) < EXACT


@pytest.mark.parametrize("attention", ["eager", grouped.register()])
def test_other_attention_implementations_give_the_same(
    model: PreTrainedModel, decoder: Decoder, attention: str
) -> None:
    ids, holes = random_ids(2, 20), torch.tensor([3, 11, 19])
    buffer = decoder.buffer(20, 2)
    expected = decoder.forward(ids, buffer, range(20), keep=20)
    model.set_attn_implementation(attention)
    other = Decoder(model)
    assert max_error(other.forward(ids[:, holes], buffer, holes, keep=3), expected[:, holes]) < EXACT
    assert max_error(other.forward(ids[:, -1:], buffer, range(19, 20)), expected[:, -1:]) < EXACT
    assert max_error(other.forward(ids[:, 5:], buffer, range(5, 20), keep=9), expected[:, -9:]) < EXACT
    assert max_error(other.forward(ids, buffer, range(20), keep=20), expected) < EXACT


@pytest.mark.parametrize("keep", [0, 1, 3, 13])
def test_a_suffix_in_chunks_is_the_whole_suffix(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    ids, buffer = random_ids(1, 20), decoder.buffer(20)
    expected = decoder.forward(ids, buffer, range(20), keep=20)
    other = decoder.buffer(20)
    other.keys[:, :, :, :7], other.values[:, :, :, :7] = buffer.keys[:, :, :, :7], buffer.values[:, :, :, :7]
    monkeypatch.setattr("anchorctx.kvcomm.decoder.CHUNK", 4)
    found = decoder.forward(ids[:, 7:], other, range(7, 20), keep=keep)
    assert found.shape[1] == keep and (not keep or max_error(found, expected[:, -keep:]) < EXACT)
    assert error(other.kv(0, 20), buffer.kv(0, 20)) < EXACT


def test_generate_from_a_placed_cache_equals_dense(model: PreTrainedModel, decoder: Decoder) -> None:
    """transformers' own `generate` goes on from N - 1 entries that were stored un-rotated and placed again."""
    ids = random_ids(2, 16, seed=4)
    plain = decoder.rope.unrotated(decoder.encode(ids[:, :-1]))
    placed = decoder.rope.rotated(plain, 0)
    cache = DynamicCache(ddp_cache_data=list(zip(placed.keys.unbind(0), placed.values.unbind(0), strict=True)))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    name = decoder._cache_name
    assert torch.equal(model.generate(ids, **{name: cache}, **options), model.generate(ids, **options))  # type: ignore
    assert error(decoder.from_cache(cache).cut(0, 15), decoder.encode(ids[:, :-1])) < EXACT


def test_repeated_moves_do_not_drift(decoder: Decoder) -> None:
    """In float32, a hundred placements of a stored segment leave what one does; chained rotations drift."""
    kv = decoder.rope.unrotated(decoder.encode(random_ids(1, 8)))
    single = KV(kv.keys.float(), kv.values.float())
    decoder.rope.dtype = torch.float32
    decoder.rope._tables = decoder.rope._compute(512)
    chained = single
    for start in range(100, 200):
        placed = decoder.rope.rotated(single, start)
        chained = decoder.rope.rotated(chained, start)
    assert torch.equal(placed.keys, decoder.rope.rotated(single, 199).keys)
    assert max_error(chained.keys, placed.keys) > 2 * max_error(placed.keys, decoder.rope.rotated(kv, 199).keys)


# -- arms -------------------------------------------------------------------------------------------------------------


def test_arms_that_compute_everything_are_dense(decoder: Decoder) -> None:
    contents = {"x": X, "y": Y}
    pool = Kvcomm()
    for arm in (Dense(), DensePrefixCache(), RotateGlue(100), RotateFirst(100), Blend(1.0), pool, MeanOffset()):
        here = context(decoder, contents)
        found = prefill(here, arm, 0)
        expected = dense_logits(decoder, here.prompt.ids)
        assert max_error(found.logits, expected[-1]) < EXACT, arm.name
        assert error(whole(found, here.prompt.length), decoder.encode(decoder.tensor(here.prompt.ids))) < EXACT
        arm.observe(here, found.buffer, found.given)
    assert found.computed == here.prompt.length - 3  # BOS and "ab" come from the session


def test_first_tokens_are_a_curve_from_rotate_to_dense(decoder: Decoder) -> None:
    """In "ab{x}cd{y}ef..." k tokens of every segment behind the first are computed, and the last token always."""
    rests = []
    for k in (0, 1, 2, 3, 100):
        here = context(decoder, {"x": X, "y": Y})
        found = prefill(here, RotateFirst(k), 0)
        first, *others = here.prompt.segments
        last_is_new = others[-1].length > k
        assert found.computed == sum(min(k, s.length) for s in others) + last_is_new
        glued = prefill(context(decoder, {"x": X, "y": Y}), RotateGlue(k), 0)
        same = all(s.length <= k for s in others if s.name is None)
        rests.append(error(whole(found, here.prompt.length), decoder.encode(decoder.tensor(here.prompt.ids))))
        assert (error(whole(found, here.prompt.length), whole(glued, here.prompt.length)) == 0.0) is same
        if k == 0:
            assert error(whole(found, here.prompt.length), whole(prefill(here, Rotate(), 0), here.prompt.length)) == 0.0
    assert rests[0] > 0.01 and rests[-1] < EXACT


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
def test_blend_recomputes_the_tokens_that_deviate_most(decoder: Decoder, share: float) -> None:
    here = context(decoder, {"x": X, "y": Y})
    found, length, start = prefill(here, Blend(share), 0), here.prompt.length, here.prompt.segments[0].stop
    last = length - 1
    dense = decoder.encode(decoder.tensor(here.prompt.ids))
    rotated = whole(prefill(context(decoder, {"x": X, "y": Y}), Rotate(), 0), length)
    mine = whole(found, length)
    apart = [
        (a[1, 0] - b[1, 0]).square().sum((0, 2)) / b[1, 0, :, start:last].square().sum((0, 2)).mean()
        for a, b in ((rotated.keys, dense.keys), (rotated.values, dense.values))
    ]
    chosen = set((apart[0] + apart[1])[start:last].topk(math.ceil(share * (last - start))).indices.tolist())
    kept = [slot for slot in range(start, last) if slot - start not in chosen]
    assert found.computed == length - start - len(kept)
    for a, b in ((mine.keys, dense.keys), (mine.values, dense.values)):
        assert max_error(a[:2], b[:2]) < EXACT  # the first two layers are fresh for all
    if kept and decoder.layers > 2:
        assert max_error(mine.keys[2:, :, :, kept], rotated.keys[2:, :, :, kept]) < EXACT
    if share == 1.0:
        assert max_error(found.logits, dense_logits(decoder, here.prompt.ids)[-1]) < EXACT
    else:
        assert here.tally.tokens < length + len(X) + len(Y)  # a part of the model counts as such


def test_prefix_cache_is_exact_and_reuses_what_is_equal(decoder: Decoder) -> None:
    arm = DensePrefixCache()
    first = context(decoder, {"x": X, "y": Y})
    arm.observe(first, (found := prefill(first, arm, 0)).buffer, found.given)
    second = context(decoder, {"x": X, "y": (9, 8, 70)})
    found = prefill(second, arm, 0)
    assert found.computed == second.prompt.length - (3 + len(X) + 2 + 2)
    assert max_error(found.logits, dense_logits(decoder, second.prompt.ids)[-1]) < EXACT
    again = prefill(first, arm, 0)
    assert again.computed == 1 and max_error(again.logits, dense_logits(decoder, first.prompt.ids)[-1]) < EXACT


def test_layer_0_is_exact_in_every_moving_arm(decoder: Decoder) -> None:
    here = context(decoder, {"x": X, "y": Y})
    dense = decoder.encode(decoder.tensor(here.prompt.ids))
    found = whole(prefill(here, Rotate(), 0), here.prompt.length)
    naive = whole(prefill(context(decoder, {"x": X, "y": Y}), Naive(), 0), here.prompt.length)
    assert max_error(found.keys[0], dense.keys[0]) < EXACT
    assert max_error(found.values[0], dense.values[0]) < EXACT
    assert max_error(found.values[1], dense.values[1]) > 0.01
    assert max_error(naive.keys[0], dense.keys[0]) > 0.01 and max_error(naive.values[0], dense.values[0]) < EXACT


@pytest.mark.parametrize("recompute_glue", [False, True])
@pytest.mark.parametrize("arm_type", ["kvcomm", "mean_offset"])
def test_the_sample_itself_as_only_exemplar_reproduces_dense(
    decoder: Decoder, arm_type: str, recompute_glue: bool
) -> None:
    arm: Arm = (
        Kvcomm(PoolConfig(gamma=0.0, min_exemplars=20), recompute_glue=recompute_glue)  # equal tokens are shared always
        if arm_type == "kvcomm"
        else MeanOffset(warmup=1)
    )
    first = context(decoder, {"x": X, "y": Y}, number=0)
    found = prefill(first, arm, 0)
    arm.observe(first, found.buffer, found.given)
    second = context(decoder, {"x": X, "y": Y}, number=1)
    again = prefill(second, arm, 0)
    assert all(again.reused) and again.computed < 7
    assert error(whole(again, second.prompt.length), whole(found, first.prompt.length)) < EXACT
    assert max_error(again.logits, dense_logits(decoder, second.prompt.ids)[-1]) < EXACT


def test_weights_by_token_are_each_tokens_own_sum(decoder: Decoder) -> None:
    base, offsets = (decoder.rope.unrotated(decoder.encode(decoder.tensor(ids))) for ids in (X, X[::-1]))
    others = [offsets.layers(1), base.layers(1)]
    weights = torch.rand(2, len(X), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = base.weighted_sum(others, weights)
    for t in range(len(X)):
        one = base.cut(t, t + 1).weighted_sum([other.cut(t, t + 1) for other in others], weights[:, t].tolist())
        assert error(found.cut(t, t + 1), one) < EXACT


def test_a_content_that_cannot_be_shared_computes_itself_alone(decoder: Decoder) -> None:
    """y is longer than its exemplar: it and the glue behind it are computed, x stays approximated; x's KV is exact."""
    arm = Kvcomm(PoolConfig(gamma=1.0, min_exemplars=1))
    first = context(decoder, {"x": X, "y": Y}, Template.parse("ab{x}cd{y}ef"))
    arm.observe(first, (found := prefill(first, arm, 0)).buffer, found.given)
    second = context(decoder, {"x": X, "y": (*Y, 4)}, Template.parse("ab{x}cd{y}ef"), number=1)
    found = prefill(second, arm, 0)
    assert found.reused == (True, False) and found.computed == len(Y) + 1 + 2
    assert max_error(found.logits, dense_logits(decoder, second.prompt.ids)[-1]) < EXACT
    whole_agent = Kvcomm(PoolConfig(gamma=1.0, min_exemplars=1), partial=False)
    whole_agent.pool = arm.pool
    assert prefill(second, whole_agent, 0).computed == second.prompt.length - 3


def test_messages_keep_the_speakers_own_kv(decoder: Decoder) -> None:
    """What a speaker's cache holds of its message equals a dense run over prompt and message."""
    here, message = context(decoder, {"x": X, "y": Y}), (33, 44, 55, 66)
    found = prefill(here, Dense(), 4)
    recite(decoder, found.buffer, here.prompt.length, found.logits, message[:2])
    for filled in (2, 0):  # its own words go on, or another message replaces them
        shared = keep_message(here, found.buffer, message, filled)
        dense = decoder.encode(decoder.tensor((*here.prompt.ids, *message))).cut(here.prompt.length)
        assert shared.home == here.prompt.length and error(shared.kv, decoder.rope.unrotated(dense)) < EXACT


def test_recited_logits_are_the_dense_ones(decoder: Decoder) -> None:
    here, answer = context(decoder, {"x": X, "y": Y}), (33, 44, 55)
    found = prefill(here, Dense(), 3)
    logits = recite(decoder, found.buffer, here.prompt.length, found.logits, answer)
    expected = dense_logits(decoder, (*here.prompt.ids, *answer))[here.prompt.length - 1 : -1]
    assert max_error(logits, expected) < EXACT


# -- AnchorAttention --------------------------------------------------------------------------------------------------


def anchored_logits(decoder: Decoder, layout: PackedLayout, ids: Ids, final: int) -> torch.Tensor:
    """(V,) of the last token by one masked forward: documents under the anchor mask, the `final` tokens see all."""
    allowed = torch.from_numpy(layout.allowed_array())
    allowed[-final:] = torch.ones(final, len(ids), dtype=torch.bool).tril(len(ids) - final)
    return decoder.model(decoder.tensor(ids), attention_mask=allowed[None, None], use_cache=False).logits[0, -1]


def test_anchored_equals_one_forward_under_the_anchor_mask(decoder: Decoder) -> None:
    here = context(decoder, {"x": X, "y": Y}, Template.parse("{x}cd{y}{x}ef"))
    offsets = (0, *(s.stop for s in here.prompt.segments))
    found = prefill(here, Anchored(), 0)
    expected = anchored_logits(decoder, PackedLayout(offsets, 1), here.prompt.ids, final=2)
    assert max_error(found.logits, expected) < EXACT
    assert max_error(found.logits, dense_logits(decoder, here.prompt.ids)[-1]) > 0.01
    at_end = context(decoder, {"x": X, "y": Y}, Template.parse("{x}{y}"))
    offsets = (0, *(s.stop for s in at_end.prompt.segments))
    found = prefill(at_end, Anchored(), 0)
    assert max_error(found.logits, anchored_logits(decoder, PackedLayout(offsets, 1), at_end.prompt.ids, 1)) < EXACT


def test_a_document_behind_the_anchor_knows_no_other_document(decoder: Decoder) -> None:
    """Under the anchor mask its KV is the same whatever the others say; under full attention it is not."""
    layout, model = PackedLayout((0, 1, 9, 20), 1), decoder.model
    model.set_attn_implementation("anchor_reference")
    caches = []
    for ids in (random_ids(1, 20), torch.cat([random_ids(1, 9, seed=1), random_ids(1, 20)[:, 9:]], 1)):
        ids[:, 0] = BOS
        out = model(ids, position_ids=layout.position_ids()[None], layouts=(layout,), use_cache=True)
        caches.append(decoder.from_cache(getattr(out, decoder._cache_name)).cut(9))
    model.set_attn_implementation("sdpa")
    assert error(*caches) == 0.0
    document = random_ids(1, 20)[:, 9:]
    alone = decoder.encode(document, position=9, behind=decoder.encode(decoder.tensor([BOS])))
    assert error(alone, caches[0]) < EXACT
    other = decoder.encode(random_ids(1, 20, seed=2)[:, :9])
    assert error(decoder.encode(document, position=9, behind=other), alone) > 0.1


def test_moving_a_document_away_from_its_anchor_is_not_exact(decoder: Decoder) -> None:
    anchor, document = decoder.encode(decoder.tensor([BOS])), random_ids(1, 11)
    near, far = (decoder.encode(document, position=p, behind=anchor) for p in (1, 60))
    moved = decoder.rope.rotated(decoder.rope.unrotated(near), 60)
    assert max_error(moved.keys[0], far.keys[0]) < EXACT
    assert error(moved, far) > 0.01
