"""The probe against plain loops and against layers computed by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.rope import set_rope_dtype
from anchorctx.evals.evaluators.precision import probe
from anchorctx.evals.evaluators.precision.measure import (
    Instrument,
    TextRow,
    document_queries,
    late_queries,
    shares_states,
)
from anchorctx.evals.evaluators.precision.probe import Probe, allowed_rows, compare, first_keys
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.testing.tiny import ARCHITECTURES

LAYOUTS = [
    PackedLayout((0, 40)),
    PackedLayout((0, 1, 15, 16, 40), anchor_len=1),
    PackedLayout((0, 2, 10, 22, 30, 40), anchor_len=2, doc_ids=(9, 1, 2, 1, 3)),
    PackedLayout((0, 7, 8, 40)),
]


@pytest.mark.parametrize(("layout", "window"), list(itertools.product(LAYOUTS, (None, 5))))
def test_allowed_rows_are_rows_of_the_specification(layout: PackedLayout, window: int | None):
    queries = np.array([0, 3, 14, 15, 16, 29, 39])
    np.testing.assert_array_equal(allowed_rows(layout, queries, window), layout.allowed_array(window)[queries])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_keys_are_the_first_that_a_token_sees(layout: PackedLayout):
    np.testing.assert_array_equal(first_keys(layout), layout.allowed_array().argmax(1))


def test_compare_is_the_plain_loop():
    torch.manual_seed(0)
    layout, queries = LAYOUTS[3], np.array([3, 6, 7, 20, 39])
    before, after = torch.randn(2, 3, 5, 40)
    allowed, first = allowed_rows(layout, queries), first_keys(layout)[queries]
    found = compare(before, after, torch.from_numpy(allowed), torch.from_numpy(first))
    keys = np.zeros(40)
    for n in range(5):
        moved, hidden, first_moved, first_before, score = [], [], [], [], []
        for h in range(3):
            seen = [k for k in range(40) if allowed[n, k]]
            old, new = (np.exp(x[h, n, seen].double().numpy()) for x in (before, after))
            change = new / new.sum() - old / old.sum()
            keys[seen] += np.abs(change) / 15
            moved.append(np.abs(change).sum() / 2)
            assert seen[0] == first[n]
            first_moved.append(abs(change[0]))
            first_before.append((old / old.sum())[0])
            old, new = old[1:], new[1:]
            hidden.append(np.abs(new / new.sum() - old / old.sum()).sum() / 2 if len(old) else 0.0)
            score.append(np.abs((after - before)[h, n, seen].double().numpy()))
        assert found.attention[n] == pytest.approx(np.mean(moved), rel=1e-12)
        assert found.hidden[n] == pytest.approx(np.mean(hidden), rel=1e-12)
        assert found.first[n] == pytest.approx(np.mean(first_moved), rel=1e-12)
        assert found.first_attention[n] == pytest.approx(np.mean(first_before), rel=1e-12)
        assert found.score[n] == pytest.approx(np.mean(score), rel=1e-12)
        assert found.first_score[n] == pytest.approx(np.mean(score, 0)[0], rel=1e-12)
    np.testing.assert_allclose(found.keys.numpy(), keys, rtol=1e-12)


def rope64(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE in float64, written from its definition: pairs (i, i + D/2) turn by position * theta ** (-2i / D)."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * 5e5 ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def test_nothing_moves_where_rope_is_exact():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 60, 128, dtype=torch.float64)
    allowed = torch.ones(60, 60).tril().bool()
    scores = [rope64(q, p) @ rope64(k, p).mT / 128**0.5 for p in (torch.arange(60), torch.arange(60) + 10_000)]
    found = compare(scores[0], scores[1], allowed, torch.zeros(60, dtype=torch.long))
    # Angles of 10,000 radians are good to 1e-12 in float64.
    assert found.score.max() < 1e-11 and found.attention.max() < 1e-11


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, rope: RopeDtype = RopeDtype.float32):
    probe.register()
    model = ARCHITECTURES[name].build(dtype).eval()
    set_rope_dtype(model, rope)
    model.set_attn_implementation(probe.NAME)
    return model


def text(length: int = 48, layout: PackedLayout | None = None) -> TextRow:
    ids = np.random.default_rng(0).integers(3, 96, length)
    return TextRow(ids, layout or PackedLayout((0, 1, length), anchor_len=1))


def instrument(model, layers: frozenset[int] = frozenset((0, 1)), rows_per_pass: int = 8) -> Instrument:
    return Instrument(model, layers, rows_per_pass, emulated=False)


FULL = PackedLayout((0, 48))


@pytest.mark.parametrize("rope", [RopeDtype.bfloat16, RopeDtype.float32])
def test_isolated_layers_are_what_one_computes_by_hand(rope: RopeDtype):
    """Hidden states from transformers' own eager model; then projections, rotation and softmax for one layer."""
    model = tiny(rope=rope)
    row, queries = text(), late_queries(48, 6)
    positions = [torch.arange(48), torch.arange(48) + 1000]
    (found,) = instrument(model).changes(row, FULL, positions, queries)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.from_numpy(row.ids)[None]
        states = model(ids, position_ids=positions[0][None], output_hidden_states=True).hidden_states
        for number, layer in enumerate(model.model.layers):
            x = layer.input_layernorm(states[number])
            q = layer.self_attn.q_proj(x).view(1, 48, 4, 8).transpose(1, 2)
            k = layer.self_attn.k_proj(x).view(1, 48, 2, 8).transpose(1, 2)
            scores = []
            for p in positions:
                cos, sin = model.model.rotary_emb(x, p[None])
                a, b = apply_rotary_pos_emb(q, k, cos, sin)
                scores.append((a @ b.repeat_interleave(2, 1).mT / 8**0.5)[0, :, queries])
            seen = torch.from_numpy(allowed_rows(FULL, queries.numpy()))
            expected = compare(scores[0], scores[1], seen, torch.zeros(6, dtype=torch.long))
            # Both are float32 noise around zero, so only its size can agree: the hidden states differ in the 7th digit.
            ratio = found[number].score.mean() / expected.score.mean()
            assert 0.8 < ratio < 1.25
            np.testing.assert_allclose(found[number].first_attention, expected.first_attention, rtol=1e-4)


def test_a_copy_at_the_same_positions_does_not_change():
    for dtype, rope in itertools.product((torch.float32, torch.bfloat16), (RopeDtype.bfloat16, RopeDtype.float32)):
        model = tiny(dtype=dtype, rope=rope)
        same = [torch.arange(48)] * 3
        for change in instrument(model).changes(text(), FULL, same, late_queries(48, 9)):
            for layer in change.values():
                assert layer.attention.max() == layer.score.max() == layer.hidden.max() == 0


def test_chunks_of_copies_do_not_matter():
    model, positions = tiny(), [torch.arange(48) + shift for shift in (0, 1, 16, 300)]
    one, many = (
        instrument(model, rows_per_pass=rows).changes(text(), FULL, positions, late_queries(48, 9)) for rows in (1, 8)
    )
    for a, b in zip(one, many, strict=True):
        for layer in a:
            torch.testing.assert_close(a[layer].attention, b[layer].attention, rtol=0.2, atol=1e-7)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_probed(name: str):
    """float32 keeps RoPE relative; bfloat16 does so less, even where a model always rotates in float32 (OLMo)."""
    changes = {}
    for dtype, rope in ((torch.float32, RopeDtype.float32), (torch.bfloat16, RopeDtype.bfloat16)):
        model = tiny(name, dtype, rope)
        (found,) = instrument(model).changes(
            text(), FULL, [torch.arange(48), torch.arange(48) + 256], late_queries(48, 9)
        )
        changes[dtype] = max(float(change.attention.max()) for change in found.values())
    # Measured: 5e-8 (gpt_neox) to 5.3e-7 (qwen3) in float32, 1.4e-3 (olmo3) to 5.0e-3 (mixtral) in bfloat16.
    assert changes[torch.float32] < 1e-6
    assert changes[torch.bfloat16] > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_isolated_copies_may_share_their_states(name: str):
    """One row under several sets of positions, as several rows would be; not where a head is rotated in part."""
    model = ARCHITECTURES[name].build(torch.bfloat16).eval()
    probe.register()
    model.set_attn_implementation(probe.NAME)
    assert shares_states(model) == (name not in ("phi3", "phi3_window", "gpt_neox", "deepseek_v3"))
    if not shares_states(model):
        return
    row, layout = TextRow(np.arange(64) % 90, PackedLayout((0, 64))), PackedLayout((0, 64))
    positions, queries = [torch.arange(64) + shift for shift in (0, 16, 300)], late_queries(64, 16)
    apart, together = (
        Instrument(model, frozenset((0, 1)), 8, emulated=False, shared=shared).changes(row, layout, positions, queries)
        for shared in (False, True)
    )
    for a, b in zip(apart, together, strict=True):
        for layer, field in itertools.product((0, 1), ("attention", "hidden", "first", "score", "keys")):
            # The same bits on an AMD EPYC; another CPU may sum products of other shapes in another order.
            torch.testing.assert_close(getattr(b[layer], field), getattr(a[layer], field), rtol=0.02, atol=2e-5)


def test_log_probabilities_are_the_models_own():
    model, row, queries = tiny(), text(), late_queries(48, 11)
    positions = [torch.arange(48), torch.arange(48) * 2]  # not a shift: it must matter
    found = instrument(model, rows_per_pass=1).log_probabilities(row, FULL, positions, queries)
    model.set_attn_implementation("eager")
    ids = torch.from_numpy(row.ids)[None]
    for given, logp in zip(positions, found, strict=True):
        with torch.no_grad():
            whole = model(ids, position_ids=given[None]).logits[0].double().log_softmax(-1)
        torch.testing.assert_close(logp, whole[queries, ids[0, queries + 1]], rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_packed_rows_are_probed_under_their_mask():
    layout = PackedLayout((0, 1, 20, 48), anchor_len=1)
    reset, running = (p.apply(layout) for p in (Pattern.intra_doc_reset, Pattern.intra_doc))
    queries = document_queries(running, 100)
    assert queries.tolist() == [*range(9, 19), *range(28, 47)]
    model, row = tiny(), text(layout=layout)
    (found,) = instrument(model).changes(row, running, [reset.position_ids(), running.position_ids()], queries)
    first = first_keys(running)[queries.numpy()]
    assert set(first.tolist()) == {1, 20}
    assert all(change.attention.max() < 1e-5 for change in found.values())
    other = Probe(running, queries, frozenset((0,)), isolate=True)
    with pytest.raises(TypeError):
        model(torch.from_numpy(row.ids)[None])  # a probe is not optional
    assert other.found == {}
