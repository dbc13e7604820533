"""Every causal decoder of transformers through KV reuse: exact in float64, or refused in one sentence.

Measured over all that are exact: at most 3e-14 (1e-10 leaves room for other CPUs), but for those whose angles are
float32 tables in any model: moving their keys is as exact as these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from anchorctx.errors import UserError
from anchorctx.kvcomm.arms.basic import RotateFirst
from anchorctx.kvcomm.arms.blend import Blend
from anchorctx.kvcomm.arms.offsets import Kvcomm
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.kvcomm.rope import Layers, Rotation
from anchorctx.kvcomm.turn import prefill
from anchorctx.testing import decoders
from anchorctx.testing.numerics import max_error
from anchorctx.testing.reuse import X, Y, context, dense_logits, error, random_ids
from anchorctx.testing.tiny import true_float64

EXACT = 1e-10
TABLES = {"gptj": 1e-6, "codegen": 1e-6, "phimoe": 2e-6}
"""Measured: 4.9e-7, 4.1e-7 and 8.5e-7."""
FAMILIES: dict[str, Any] = {
    "cohere": Rotation(0, 8, neighbours=True),
    "ernie4_5": Rotation(0, 8, neighbours=True),
    "helium": Rotation(0, 8, neighbours=True),
    "gptj": Rotation(0, 4, neighbours=True),
    "glm4": Rotation(0, 4, neighbours=True),
    "phi": Rotation(0, 4),
    "stablelm": Rotation(0, 2),
    "persimmon": Rotation(0, 4),
    "nanochat": Rotation(0, 8, backwards=True),
    "deepseek_v2": Rotation(0, 4, neighbours=True),
    "deepseek_v3": Rotation(0, 4),
    "smollm3": Rotation(0, 8),
    "cohere2": Rotation(0, 8, neighbours=True),
    "mistral": Rotation(0, 8),
    "gemma3_text": Rotation(0, 8),
    "gpt_oss": Rotation(0, 8),
}
"""How layer 0 of the tiny model rotates: 16 dimensions a head, 8 in MLA's rotated part."""
LATENT = {"deepseek_v2", "deepseek_v3"}
"""transformers caches a latent in place of keys and the rotated part of the keys in place of values."""
PLAIN = {"smollm3", "cohere2"}
"""Their last layer does not rotate."""


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with true_float64(), torch.no_grad():
        yield


def build(name: str) -> PreTrainedModel:
    """With sdpa, or eager where the model has no other."""
    config = decoders.tiny(name)
    try:
        found = decoders.build(config, "sdpa")
    except ValueError:
        found = decoders.build(config, "eager")
    return found.double().eval()


def check(decoder: Decoder, moved: float) -> None:
    """A cache with holes, moved keys, and the arms that have to be dense."""
    ids, length = random_ids(1, 30), 30  # longer than the tiny models' window of 5
    # By a mask of ones, which says that this is one document.
    truth = decoder.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    buffer, torn = decoder.buffer(length), decoder.buffer(length)
    assert max_error(decoder.forward(ids, buffer, range(length), keep=length), truth) < EXACT
    torn.keys.copy_(buffer.keys)
    torn.values.copy_(buffer.values)
    holes = torch.tensor([1, 2, 9, 17, 28, 29])
    torn.keys[:, :, :, holes] = torn.values[:, :, :, holes] = 1e3
    assert max_error(decoder.forward(ids[:, holes], torn, holes, keep=6), truth[:, holes]) < EXACT
    assert max_error(decoder.forward(ids[:, 7:], torn, range(7, length), keep=23), truth[:, 7:]) < EXACT

    here, there = (decoder.encode(ids[:, :9], position=position) for position in (3, 40))
    assert error(decoder.rope.rotated(decoder.rope.unrotated(here), 40), there) < moved
    assert error(here, there) > 0.01

    kvcomm, reused = Kvcomm(), ()
    for number, arm in enumerate((RotateFirst(100), Blend(1.0), kvcomm, kvcomm)):
        turn = context(decoder, {"x": X, "y": Y}, number=number)
        found = prefill(turn, arm, 0)
        arm.observe(turn, found.buffer, found.given)
        assert max_error(found.logits, dense_logits(decoder, turn.prompt.ids)[-1]) < EXACT, (number, arm.name)
        reused = found.reused
    assert all(reused)  # the sample itself is its exemplar now


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_found_and_exact(name: str) -> None:
    decoder = Decoder(build(name))
    turning, other = decoder.rope.keys, decoder.rope.values
    if name in LATENT:
        turning, other = other, turning
    assert other == (Layers(slice(0, decoder.layers), None),)
    found = [layers.rotation for layers in turning]
    assert found[0] == FAMILIES[name] and (found[-1] is None) == (name in PLAIN)
    assert len(found) == 1 + (name in PLAIN or name == "gemma3_text")  # whose kinds of layers have angles of their own
    check(decoder, TABLES.get(name, EXACT))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in decoders.TYPES if name not in FAMILIES])
def test_every_other_decoder_is_exact_or_refused(name: str) -> None:
    try:
        model = build(name)
    except (ImportError, AttributeError, TypeError, ValueError, AssertionError) as error_:
        pytest.skip(f"transformers builds none from the tiny configuration: {error_}")
    try:
        decoder = Decoder(model)
    except UserError as refusal:
        assert type(model).__name__ in str(refusal) or "Rotary" in str(refusal)
        return
    check(decoder, TABLES.get(name, EXACT))


def test_a_rotation_that_no_rule_explains_is_refused() -> None:
    """HunYuan's norm weighs each dimension after the rotation: moved as if it did not, its keys are 2 % off."""
    with pytest.raises(UserError, match=r"does not rotate the keys of layer 0 by any rule.*an error of 2\.0%"):
        Decoder(build("hunyuan_v1_dense"))
