from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.rope import rotary_modules
from anchorctx.errors import UserError
from anchorctx.evals.evaluators.precision import models
from anchorctx.evals.evaluators.precision import study as study_module
from anchorctx.evals.evaluators.precision.budget import Size, sizes
from anchorctx.evals.evaluators.precision.config import Arithmetic, PrecisionConfig
from anchorctx.evals.evaluators.precision.measure import Texts
from anchorctx.evals.evaluators.precision.models import random_score_changes
from anchorctx.evals.evaluators.precision.rows import interval_half, key_bins, mean_result
from anchorctx.evals.evaluators.precision.units import Timings
from anchorctx.evals.evaluators.precision.verdict import find, table
from anchorctx.evals.shortcuts import evaluate_precision as study
from anchorctx.records.results import Result, read_results
from anchorctx.testing.numerics import observed_rope_dtype

Make = Callable[..., PrecisionConfig]


# -- random queries and keys: what was tried before any of this was built ---------------------------------------------


def test_random_scores_reproduce_the_trial():
    """Float32 2e-6 to 7e-4, bfloat16 3.8e-3 to 4.7e-3, float32 rotation between (D = 128, theta 5e5).

    What is known of the trial is D, theta and the shifts, 16 to 130,000. Averaged over 4,096 queries, bfloat16 gives
    3.6e-3 at a shift of 16 and 3.9e-3 to 4.2e-3 beyond: the trial's range is within the spread of single queries.
    """
    shifts = (16, 4096, 130_000)
    change = {a: torch.stack(random_score_changes(a, shifts)) for a in Arithmetic}  # (shifts, queries)
    mean = {a: x.mean(1).tolist() for a, x in change.items()}
    single = change[Arithmetic.bfloat16].quantile(0.9, dim=1)
    float32, ours, bfloat16 = (mean[a] for a in (Arithmetic.float32, Arithmetic.float32_rotation, Arithmetic.bfloat16))
    assert 2e-6 < float32[0] < 3e-6 and 5e-4 < float32[-1] < 7e-4
    assert float32[0] < float32[1] < float32[2]
    assert all(3.5e-3 < x < 4.7e-3 for x in bfloat16) and all(3.8e-3 < x < 4.7e-3 for x in bfloat16[1:])
    assert 3.8e-3 < single[0] and single[-1] < 4.8e-3
    assert all(a < b < c for a, b, c in zip(float32, ours, bfloat16, strict=True))
    assert all(0.55 < b / c < 0.70 for b, c in zip(ours, bfloat16, strict=True))


# -- the study itself ------------------------------------------------------------------------------------------------


def numbers(rows: list[Result]) -> list[tuple[Any, ...]]:
    return [(row.metric, row.value, row.low, row.high, json.dumps(row.context, sort_keys=True)) for row in rows]


def test_a_study_is_whole_deterministic_and_resumable(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make_config()
    rows = study(config)
    out = Path(config.out_dir)
    assert list(read_results(out / "results.jsonl")) == rows
    assert len({row.manifest for row in rows}) == 1 and rows[0].manifest
    at = {"rows": "shift", "layer": "all", "first": "kept", "shift": 16, "length": 96}
    change = {
        (w, a): find(rows, "precision_attention_change", weights=w, arithmetic=a, **at).value  # type: ignore[union-attr]
        for w in ("trained", "control")
        for a in ("float32", "float32_rotation", "bfloat16")
    }
    for weights in ("trained", "control"):
        parts = [change[weights, a] for a in ("float32", "float32_rotation", "bfloat16")]
        assert 0 < parts[0] < parts[1] / 100 and parts[1] < parts[2]
    for layer in (0, 1, "all"):
        for first in ("kept", "hidden"):
            row = find(rows, "precision_attention_change", weights="trained", arithmetic="bfloat16", shift=2000,
                       length=96, layer=layer, first=first)  # fmt: skip
            assert row is not None and row.n == 3 and row.low is not None and row.low < row.value < row.high
    assert find(rows, "precision_attention_change", first="dropped", weights="control", arithmetic="float32")
    assert find(rows, "precision_attention_change", rows="intra_doc", layer=1, arithmetic="float32_rotation")
    names = {
        "first_share",
        "other_share",
        "first_rank",
        "first_score_change",
        "key_change",
        "logprob_change",
        "loss_change",
        "offset_change",
        "verdict",
    }
    assert {f"precision_{name}" for name in names} <= {row.metric for row in rows}
    assert "moves" in table(rows) and "Use rope_dtype=float32" in table(rows)

    # Typed again nothing is measured; cut off in the middle of a unit, what is missing is.
    file, loads = out / "results.jsonl", []
    whole, load = file.read_bytes(), models.load
    monkeypatch.setattr(models, "load", lambda *args: loads.append(args[1:3]) or load(*args))
    assert study(config) == rows and file.read_bytes() == whole and not loads
    lines = whole.splitlines(keepends=True)
    keep = next(i for i, row in enumerate(rows) if row.context.get("weights") == "control")
    file.write_bytes(b"".join(lines[:keep]))
    assert study(config) == rows and file.read_bytes() == whole
    assert loads == [(models.Weights.control, arithmetic) for arithmetic in Arithmetic]
    # Elsewhere, from the beginning: the same numbers.
    again = study(make_config(out_dir=str(tmp_path / "again")))
    assert numbers(again) == numbers(rows)
    # Another study must not be mixed in.
    with pytest.raises(UserError, match="holds another precision study of tiny"):
        study(make_config(queries=9))
    shutil.rmtree(out)


def test_parts_can_be_left_out(make_config: Make):
    rows = study(
        make_config(
            control=False, packed=False, end_to_end=False, arithmetics=[Arithmetic.bfloat16], lengths=[32], texts=1
        )
    )
    assert {row.context.get("weights") for row in rows if "weights" in row.context} == {"trained", "random"}
    metrics = {row.metric for row in rows}
    assert not metrics & {"precision_logprob_change", "precision_offset_change", "precision_cost"}
    (closing,) = (row for row in rows if row.metric == "precision_verdict")
    assert closing.context["recommendation"] == "" and "float32 rotation" not in closing.context["sentence"]


def test_emulation_changes_nothing_that_shows(make_config: Make, tmp_path: Path):
    """At this size few sums are near a tie: means over queries agree far within their intervals."""
    options = {"lengths": [64], "control": False, "packed": False, "end_to_end": False}
    real, emulated = (
        study(make_config(emulate=study_module_emulate, out_dir=str(tmp_path / study_module_emulate), **options))
        for study_module_emulate in ("never", "always")
    )
    for a, b in zip(real, emulated, strict=True):
        assert a.metric == b.metric and b.value == pytest.approx(a.value, rel=0.02, abs=1e-9)


def test_the_control_has_the_same_weights_in_every_arithmetic(folder: Path):
    subject = models.open_checkpoint(str(folder), {}, "cpu")
    control = {a: models.load(subject, models.Weights.control, a, seed=3) for a in Arithmetic}
    trained = models.load(subject, models.Weights.trained, Arithmetic.float32, seed=3)
    exact = control[Arithmetic.float32].state_dict()
    for name, weight in control[Arithmetic.bfloat16].state_dict().items():
        assert weight.dtype is torch.bfloat16 and torch.equal(weight, exact[name].bfloat16())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(exact[name], trained.state_dict()[name])
    assert exact[name].std() == pytest.approx(0.3, rel=0.1)  # the configuration's own initializer_range
    assert [observed_rope_dtype(control[a]) for a in Arithmetic] == [
        RopeDtype.bfloat16,
        RopeDtype.float32,
        RopeDtype.float32,
    ]
    assert all(m.inv_freq.dtype is torch.float32 for a in Arithmetic for m in rotary_modules(control[a]))


def test_default_lengths_and_layers_follow_the_model(make_config: Make, folder: Path):
    subject = models.open_checkpoint(str(folder), {}, "cpu")
    config = make_config(lengths=[], shift=5)
    setting = study_module.check(config, subject, next(sizes(config, subject.reach)))
    assert setting.lengths == (16, 32, 64, 128) and setting.layers == {0, 1} and setting.shifts == (5, 16, 2000)
    subject.config.num_hidden_layers = 32
    setting = study_module.check(make_config(), subject, Size((32, 96), 3))
    assert sorted(setting.layers) == [0, 4, 8, 12, 16, 20, 24, 28]


# -- rows ------------------------------------------------------------------------------------------------------------


def test_intervals_are_students():
    row = mean_result("m", [1.0, 2.0, 3.0], "1", {"a": 1})
    assert row.value == 2.0 and row.high == pytest.approx(2 + 4.303 / math.sqrt(3), rel=1e-4) and row.context["a"] == 1
    assert mean_result("m", [1.0], "1", {}).low is None and interval_half([1.0]) is None
    assert interval_half([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)


@pytest.mark.parametrize("length", [1, 8, 9, 100, 4096])
def test_key_bins_cover_every_key_once(length: int):
    bins = list(key_bins(length))
    assert [k for start, stop in bins for k in range(start, stop)] == list(range(length))


def test_rows_of_text_are_the_corpus(folder: Path):
    tokenizer = models.open_checkpoint(str(folder), {}, "cpu").tokenizer
    documents = ["abc" * 5, "x = 1\n" * 20, "", "last"]
    texts = Texts(documents, tokenizer)
    one, two = texts.rows(40, 2)
    ids = [i for document in documents for i in tokenizer(document)["input_ids"]]
    assert one.ids.tolist() == [tokenizer.bos_token_id, *ids[:39]]
    assert two.ids.tolist() == [tokenizer.bos_token_id, *ids[-39:]]
    end = len(tokenizer(documents[0])["input_ids"]) + 1
    assert one.layout.doc_offsets == (0, 1, end, 40)
    last = len(tokenizer("last")["input_ids"])
    assert two.layout.doc_offsets == (0, 1, 40 - last, 40)
    assert one.without_first().ids.tolist() == ids[:39]
    with pytest.raises(UserError, match=r"2 different rows of 400 need 798"):
        texts.rows(400, 2)


def test_packed_rows_hold_several_documents(folder: Path):
    tokenizer = models.open_checkpoint(str(folder), {}, "cpu").tokenizer
    documents = [f"value = {i}\n" * (1 + 9 * (i % 2)) for i in range(60)]
    rows = Texts(documents, tokenizer).packed_rows(96, 3)
    assert len(rows) == 3
    ids = [tokenizer(document)["input_ids"][:11] for document in documents]
    taken = 0
    for row in rows:
        assert row.layout.length == len(row.ids) == 96 and row.layout.num_documents >= 8
        for start, stop in zip(row.layout.doc_offsets[1:], row.layout.doc_offsets[2:], strict=False):
            assert row.ids[start:stop].tolist() == ids[taken][: stop - start]
            taken += 1
    assert len(Texts(documents, tokenizer).packed_rows(96, 500)) < 60  # as many as there are
    with pytest.raises(UserError, match="too few documents to pack a row of 96"):
        Texts(["short"], tokenizer).packed_rows(96, 1)


def test_cost_is_the_ratio_of_paired_steps():
    timings = Timings([1.0, 2.0, 4.0], [1.1, 2.2, 4.4])
    assert timings.ratio() == pytest.approx((1.1, 1.1, 1.1))
    seconds, other, ratio = timings.rows({"length": 4, "device": "the CPU"})
    assert (seconds.value, other.value) == (2.0, 2.2) and ratio.metric == "precision_cost"


def test_the_cost_is_measured_on_whole_steps(make_config: Make):
    rows = study(make_config(cost=True, control=False, packed=False, end_to_end=False, lengths=[64], texts=2))
    ratio = find(rows, "precision_cost")
    assert ratio is not None and ratio.n == 8 and 0 < ratio.low < ratio.value < ratio.high < 10  # type: ignore[operator]
    assert all(find(rows, "precision_step_seconds", rope_dtype=name) for name in ("bfloat16", "float32"))


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": [32, 256]}, r"exceed the 128 positions .*max_position_embeddings"),
        ({"lengths": [4]}, "at least 16 tokens"),
        ({"layers": [0, 2]}, "has 2, but the model's layers are 0 to 1"),
        ({"shifts": [0, 16]}, r"shifts\[0\]=0 must be at least 1: leave 0 out"),
        ({"shift": -1}, "shift=-1 must be at least 1: leave 0 out"),
        ({"texts": 0}, "texts=0 must be at least 1"),
        ({"budget_minutes": 0}, "budget_minutes=0 must be above 0"),
        ({"arithmetics": []}, "leaves nothing to study"),
        ({"texts": 500}, "500 different rows of 32"),
        (
            {"config": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}},
            "rope_type=dynamic",
        ),
        ({"model": "/nowhere/at/all"}, "does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(make_config: Make, fields: dict[str, Any], message: str):
    config = make_config(**fields)
    with pytest.raises(UserError, match=message):
        study(config)
    assert not Path(config.out_dir).exists()


def test_a_folder_that_is_no_model(make_config: Make, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no config.json"):
        study(make_config(model=str(tmp_path / "empty")))
