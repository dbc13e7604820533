"""Every causal decoder of transformers as a tiny random model, for the sweep over all of them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from anchorctx.attention.shrink import shrink
from anchorctx.attention.trial import randomize
from anchorctx.layout import PackedLayout

TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model types that `AutoModelForCausalLM` loads."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BEFORE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
        }
    },
    "nemotron": {"num_key_value_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
}
"""Fields without which a configuration's own defaults build no model."""
AFTER: dict[str, dict[str, Any]] = {
    "dory": {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
}
"""Fields of a tiny configuration that the general rule does not find."""


def default(model_type: str) -> PretrainedConfig:
    """The configuration of that type, of full size."""
    return AutoConfig.for_model(model_type, **copy.deepcopy(BEFORE.get(model_type, {})))


def tiny(model_type: str) -> PretrainedConfig:
    """The configuration of a model of some ten thousand weights, without dropout."""
    config = shrink(default(model_type))
    for name, value in AFTER.get(model_type, {}).items():
        setattr(config, name, value)
    text = config if model_type.startswith("musicgen") else config.get_text_config()
    for part in {id(part): part for part in (config, text)}.values():
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def build(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """A model in float32, the same for the same configuration, whose weights are large enough that all of it matters.

    Its experts are computed one by one: torch's grouped matrix product has no float64.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
    model.set_experts_implementation("eager")
    return randomize(model)


# -- the oracle -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """Two documents, each behind its copy of the anchor, as a row of tokens."""

    layout: PackedLayout
    ids: torch.Tensor
    """(1, T) int64."""
    positions: torch.Tensor
    """(1, T) int64."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each document with its copy."""
        return list(itertools.pairwise(self.layout.doc_offsets))


def row(lengths: Sequence[int] = (9, 7)) -> Row:
    """Documents longer than a tiny model's window, shorter than its chunk; the row is longer than the chunk."""
    whole = PackedLayout((0, *(1 + n for n in itertools.accumulate(lengths, initial=0))), 1)
    layout, index = whole.with_copies()
    ids = torch.randint(3, 90, (whole.length,), generator=torch.Generator().manual_seed(3))
    return Row(layout, ids[torch.from_numpy(index)][None], layout.position_ids()[None])


def logits_alone(model: PreTrainedModel, row: Row) -> torch.Tensor:
    """(1, T, V) logits of each document run by itself, through the model's own eager attention.

    A mask of ones says that this is one document: by positions alone, transformers would see two in it.
    """
    found = []
    for start, stop in row.spans:
        mask = torch.ones(1, stop - start, dtype=torch.long)
        part = {"input_ids": row.ids[:, start:stop], "position_ids": row.positions[:, start:stop]}
        found.append(model(**part, attention_mask=mask, use_cache=False).logits)
    return torch.cat(found, 1)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two tensors of logits, in standard deviations of the expected ones."""
    return float((found - expected).detach().abs().max() / expected.detach().std())


def gradient_difference(found: torch.nn.Module, expected: torch.nn.Module) -> float:
    """The largest difference of the gradients of two equal models, of each parameter's largest gradient (or of 1)."""
    theirs = dict(expected.named_parameters())
    worst = 0.0
    for name, parameter in found.named_parameters():
        pair = [g for g in (parameter.grad, theirs[name].grad) if g is not None]
        if len(pair) == 1 and pair[0].any():
            return float("inf")
        if len(pair) == 2:
            worst = max(worst, float((pair[0] - pair[1]).abs().max() / max(1.0, float(pair[1].abs().max()))))
    return worst
