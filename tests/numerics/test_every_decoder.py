"""Every causal decoder of transformers, by each way in: packed documents stay apart, or one sentence says why not.

A packed row (each document behind its copy of the anchor) against every document alone through the model's own eager
attention, logits and gradients, float64. The ways in: our training's `load_model`; plain Python,
`from_pretrained(..., attn_implementation="anchor")`; `check_model` with a flattened batch and its `cu_seq_lens_q`.

Tolerance: measured over all decoders that are exact, logits differ by at most 2.2e-14 of their standard deviation and
gradients by 3.3e-14 of their largest (or of 1); 1e-12 leaves room for other processors. A decoder that mixes documents
differs by 0.5 and more. `IN_FLOAT32` has parts that transformers computes in float32: 3.2e-6 and 3.8e-6 there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from anchorctx.attention.architecture import REASONS, known
from anchorctx.errors import UserError
from anchorctx.integrations import check_model
from anchorctx.models import ModelConfig, RopeConfig, build_config, load_model
from anchorctx.testing import decoders
from anchorctx.testing.tiny import true_float64

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
IN_FLOAT32 = {"diffllama"}
SAMPLE = {"llama", "gemma4", "llama4", "nemotron", "gptj", "gpt_neox_japanese", "qwen3_next", "rwkv", "bart", "gpt2"}
"""For CI: a plain one, a wrapper whose layers differ in heads, chunks, a hook, a table of angles, and refused ones."""
UNTRIED = {"gemma3n"}
"""Needs a package that is not installed here."""
UNBUILT = {"musicgen", "musicgen_melody", "reformer"}
"""transformers builds no causal decoder from these types' own default configuration."""


def sampled(exact: bool) -> list[Any]:
    """The decoders that are exact, or the others, those outside the sample marked as slow."""
    chosen = [name for name in decoders.TYPES if (name in known()[0]) == exact and name not in UNTRIED]
    return [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in chosen]


@pytest.mark.filterwarnings("ignore")  # old models' own
@pytest.mark.parametrize("name", sampled(exact=True))
def test_documents_stay_apart(name: str, tmp_path: Path) -> None:
    decoders.build(decoders.tiny(name), "eager").save_pretrained(tmp_path)
    dtype = torch.float32 if name in IN_FLOAT32 else torch.float64
    tolerance, row = TOLERANCE[dtype], decoders.row()
    with true_float64():
        alone = loaded(tmp_path, "eager").to(dtype)
        expected = decoders.logits_alone(alone, row)
        cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        (expected * cotangent).sum().backward()

        trained = load_model(ModelConfig(path=str(tmp_path))).to(dtype)
        trained.set_experts_implementation("eager")
        found = packed(trained, row, layouts=(row.layout,))
        (found * cotangent).sum().backward()
        assert decoders.difference(found, expected) < tolerance
        assert decoders.gradient_difference(trained, alone) < tolerance

        model = loaded(tmp_path, "anchor").to(dtype)
        check_model(model)
        boundaries = torch.tensor(row.layout.doc_offsets)
        for where in ({"layouts": (row.layout,)}, {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}):
            assert decoders.difference(packed(model, row, **where), expected) < tolerance


def loaded(folder: Path, attention: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    model.set_experts_implementation("eager")  # torch's grouped matrix product has no float64
    return model.eval()


def packed(model: PreTrainedModel, row: decoders.Row, **where: Any) -> torch.Tensor:
    return model(input_ids=row.ids, position_ids=row.positions, use_cache=False, **where).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sampled(exact=True))
def test_theta_reaches_the_model_or_is_refused(name: str, tmp_path: Path) -> None:
    decoders.build(decoders.tiny(name), "eager").save_pretrained(tmp_path)
    row = decoders.row()
    try:
        changed = load_model(ModelConfig(path=str(tmp_path), rope=RopeConfig(theta=1.7e6)))
    except UserError as error:
        assert "has no RoPE settings that could be changed" in str(error)
        return
    before, after = (packed(m.eval(), row, layouts=(row.layout,)) for m in (loaded(tmp_path, "anchor"), changed))
    assert decoders.difference(after, before) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sampled(exact=False))
def test_others_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    config = decoders.default(name)  # whole: some types hold sizes together that shrink apart
    config.save_pretrained(tmp_path)
    config._attn_implementation = "anchor"
    ways: list[Callable[[], Any]] = [
        lambda: build_config(ModelConfig(path=str(tmp_path))),
        lambda: check_model(SimpleNamespace(config=config)),
    ]
    if name not in UNBUILT:
        ways.append(lambda: decoders.build(decoders.tiny(name), "anchor"))
    for way in ways:
        with pytest.raises(UserError, match="^model type .*: use a RoPE decoder such as llama or qwen3$"):
            way()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(UNTRIED))
def test_a_decoder_that_cannot_be_tried_is_refused(name: str, tmp_path: Path) -> None:
    decoders.tiny(name).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model type {name} is not known here and could not be tried .ImportError"):
        build_config(ModelConfig(path=str(tmp_path)))


def test_the_list_is_of_this_version_and_of_all_decoders() -> None:
    exact, refused, version = known()
    newest, here = (tuple(map(int, v.split(".")[:2])) for v in (version, transformers.__version__))
    assert here <= newest, "run scripts/sweep_decoders.py"
    assert not exact & set(refused) and set(refused.values()) <= set(REASONS)
    assert set(decoders.TYPES) - UNTRIED <= exact | set(refused)
