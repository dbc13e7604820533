"""What is said of decoders that nobody has measured, and of settings that the list of the others leaves open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from anchorctx.attention import architecture, register, trial
from anchorctx.attention.architecture import check_architecture
from anchorctx.errors import UserError
from anchorctx.testing import decoders
from anchorctx.testing.tiny import BASE


class UnknownConfig(LlamaConfig):
    model_type = "unknown"


class Unknown(LlamaForCausalLM):
    """A decoder that may take something of the token before into each token, as a convolution does."""

    config_class = UnknownConfig
    share = 0.0
    ways = 0
    """How many of them were built."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        Unknown.ways += 1

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        own = self.get_input_embeddings()(input_ids)
        before = torch.nn.functional.pad(own, (0, 0, 1, 0))[:, :-1]
        return super().forward(inputs_embeds=own + self.share * before, **kwargs)


class Broken(LlamaForCausalLM):
    config_class = UnknownConfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("needs an image")


@pytest.fixture(autouse=True)
def _unknown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    register()
    monkeypatch.setattr(architecture, "_outcomes", {})
    AutoConfig.register("unknown", UnknownConfig)
    AutoModelForCausalLM.register(UnknownConfig, Unknown)
    yield
    del CONFIG_MAPPING._extra_content["unknown"], MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[UnknownConfig]


def test_an_unknown_decoder_is_tried_once() -> None:
    Unknown.ways = 0
    for _ in range(3):
        check_architecture(UnknownConfig(**BASE))
    assert Unknown.ways == 1


def test_a_verdict_is_of_all_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch of the configuration may change what a decoder does."""
    monkeypatch.setattr(Unknown, "share", property(lambda model: model.config.own))
    check_architecture(UnknownConfig(**BASE, own=0.0))
    with pytest.raises(UserError, match="mixes packed documents"):
        check_architecture(UnknownConfig(**BASE, own=0.1))
    check_architecture(UnknownConfig(**BASE, own=0.0))


def test_a_trial_that_is_broken_off_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(config: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(Unknown, "share", 0.1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trial, "deviation", interrupt)
        check_architecture(UnknownConfig(**BASE))
    with pytest.raises(UserError, match="mixes packed documents"):
        check_architecture(UnknownConfig(**BASE))


@pytest.mark.parametrize("words", [4, 60])
def test_a_small_vocabulary_is_tried_too(words: int) -> None:
    check_architecture(UnknownConfig(**BASE | {"vocab_size": words}))


def test_one_that_mixes_documents_is_refused_with_the_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unknown, "share", 0.1)
    message = r"model type unknown mixes packed documents: a tiny copy's logits differ by \d[\d.e+-]* of their standard"
    with pytest.raises(UserError, match=message):
        check_architecture(UnknownConfig(**BASE))


def test_plain_python_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unknown, "share", 0.1)
    row, model = decoders.row(), AutoModelForCausalLM.from_config(UnknownConfig(**BASE), attn_implementation="anchor")
    with pytest.raises(UserError, match="model type unknown mixes packed documents"):
        model(input_ids=row.ids, position_ids=row.positions, layouts=(row.layout,))


def test_one_that_cannot_be_tried_is_refused_with_the_reason() -> None:
    AutoModelForCausalLM.register(UnknownConfig, Broken, exist_ok=True)
    with pytest.raises(UserError, match=r"could not be tried \(RuntimeError: needs an image\)"):
        check_architecture(UnknownConfig(**BASE))


def test_a_trial_leaves_random_states_and_the_default_device() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        assert trial.deviation(UnknownConfig(**BASE)) < trial.TOLERANCE / 10
    assert torch.equal(before, torch.get_rng_state())


def test_kinds_of_layers_of_a_known_decoder_are_looked_at() -> None:
    check_architecture(AutoConfig.for_model("lfm2", layer_types=["full_attention"] * 2, num_hidden_layers=2))
    with pytest.raises(UserError, match="model type lfm2 has conv layers, which would mix packed documents"):
        check_architecture(AutoConfig.for_model("lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2))


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text"])
def test_a_bidirectional_gemma_is_refused(name: str) -> None:
    config = AutoConfig.for_model(name)
    check_architecture(config)
    text = config.get_text_config()
    if "gemma4" in name:
        text.use_bidirectional_attention = "vision"  # among tokens of an image
        check_architecture(config)
    text.use_bidirectional_attention = "all" if "gemma4" in name else True
    with pytest.raises(UserError, match=f"model type {name} has an encoder, or lets tokens see those behind them"):
        check_architecture(config)


def test_documents_longer_than_a_chunk_are_refused() -> None:
    model = decoders.build(decoders.tiny("llama4"), "anchor")  # chunks of 16 tokens, queries scaled from 12 on
    longest = architecture.longest_document(model.config)
    assert longest == 11
    for own in (longest - 1, longest):
        row = decoders.row((own, 3))
        arguments = {"input_ids": row.ids, "position_ids": row.positions, "layouts": (row.layout,), "use_cache": False}
        if own + 1 > longest:  # with its copy of the anchor
            with pytest.raises(UserError, match="may have 11 tokens with their anchor, but one has 12: cut documents"):
                model(**arguments)
        else:
            model(**arguments)


def test_every_reason_is_some_decoders() -> None:
    assert set(architecture.known()[1].values()) == set(architecture.REASONS)
