"""Tries out a decoder that nobody has measured: two documents in one row against each of them alone."""

from __future__ import annotations

import copy
import logging

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from anchorctx.attention.interface import register
from anchorctx.attention.shrink import VOCABULARY, shrink
from anchorctx.layout import PackedLayout

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference of logits, in their standard deviations, that still counts as rounding in float32.

Measured over all decoders of transformers 5.24: at most 1.3e-5 for those that are exact, 0.06 and more for others.
"""
LENGTHS = (9, 7)
"""Tokens of the documents, without their copies of the anchor: longer than the tiny copy's window."""


def try_out(config: PretrainedConfig) -> str | None:
    """Why this decoder must be refused, as the end of a sentence, or None: measured on a tiny copy, in float32."""
    register()
    try:
        found = deviation(config)
    except Exception as error:  # whatever a model that nobody has seen may raise
        logger.debug("the trial of %s failed", config.model_type, exc_info=True)
        return f"is not known here and could not be tried ({type(error).__name__}: {str(error).strip()[:100]})"
    if found > TOLERANCE:
        return f"mixes packed documents: a tiny copy's logits differ by {found:.2g} of their standard deviation"
    logger.info("model type %s is not known here: tried, it keeps documents apart (%.1g)", config.model_type, found)
    return None


@torch.no_grad()
def deviation(config: PretrainedConfig) -> float:
    """How far logits of a packed row are from those of its documents alone, in standard deviations of the latter.

    The row goes through the layout's attention, the documents through the model's own eager attention.
    """
    with torch.random.fork_rng([]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        row = PackedLayout((0, 1, 1 + LENGTHS[0], 1 + sum(LENGTHS)), 1)
        layout, index = row.with_copies()
        tiny = shrink(config)
        size = min(getattr(tiny.get_text_config(), "vocab_size", VOCABULARY), VOCABULARY)
        ids = torch.randint(min(3, size - 1), size, (row.length,))[torch.from_numpy(index)][None]  # 0 to 2 are special
        positions = layout.position_ids()[None]
        built = AutoModelForCausalLM.from_config(tiny, attn_implementation="anchor_reference", dtype=torch.float32)
        model = randomize(built).eval()  # built with our attention, it hands on keywords
        plain = copy.deepcopy(model)
        plain.set_attn_implementation("eager")
        packed = model(input_ids=ids, position_ids=positions, layouts=(layout,), use_cache=False).logits
        alone = []
        for start, stop in zip(layout.doc_offsets, layout.doc_offsets[1:], strict=False):
            mask = torch.ones(1, stop - start, dtype=torch.long)  # without one, jumps of positions begin a new document
            part = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop], "attention_mask": mask}
            alone.append(plain(**part, use_cache=False).logits)
        expected = torch.cat(alone, 1)
        return float((packed - expected).abs().max() / expected.std())


@torch.no_grad()
def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Draw the weights anew, large enough that attention matters (transformers' 0.02 leaves it almost linear).

    Norms and biases stay near what they were.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.copy_(0.2 * noise) if parameter.dim() > 1 else parameter.add_(0.05 * noise)
    return model
