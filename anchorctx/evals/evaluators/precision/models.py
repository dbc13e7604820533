"""What is studied: a checkpoint, the same architecture with weights drawn anew, and random queries and keys.

Each in three arithmetics (`Arithmetic`). On CPUs whose bfloat16 matrix products are slow, these are computed in float32
and rounded, while everything else stays real bfloat16. A product of two bfloat16 numbers has 16 significant bits, so
float32 holds it exactly; kernels then sum in float32 and round once, and so does the emulation. Only the order of
the sum can differ, which shows where a sum lies within float32's error of the middle between two bfloat16 numbers: 2
results in 10,000 of products over 1,024, 2 in a million over 64.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.rope import LENGTH_BOUND, set_rope_dtype
from anchorctx.errors import UserError
from anchorctx.evals.evaluators.precision import probe
from anchorctx.evals.evaluators.precision.config import Arithmetic, Emulate
from anchorctx.models import reach
from anchorctx.models.load import load_weights, read_config, read_tokenizer
from anchorctx.models.rope import full_parameters


class Weights(StrEnum):
    """Which weights a variant has."""

    trained = "trained"
    """The checkpoint's."""
    control = "control"
    """Drawn anew, as before any training."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The model that is studied, before any weight is read."""

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    device: torch.device

    @property
    def reach(self) -> int:
        """Tokens that its positions reach."""
        return reach(self.config)

    @property
    def layers(self) -> int:
        """Number of its decoder layers."""
        return int(self.config.num_hidden_layers)


def open_checkpoint(path: str, fields: dict[str, Any], device: str) -> Checkpoint:
    """Read configuration and tokenizer; UserError when the folder holds no model that can be studied."""
    config, tokenizer = read_config(path, fields).get_text_config(), read_tokenizer(path)
    if not getattr(config, "rope_parameters", None):
        raise UserError(f"model={path} ({config.model_type}) has no rotary position embeddings: name a RoPE decoder")
    kind = full_parameters(config).get("rope_type", "default")
    if kind in LENGTH_BOUND:
        raise UserError(
            f"model={path} has rope_type={kind}, whose frequencies change with the highest position, so that a shift "
            "is meant to change its attention: study it with config='{rope_parameters: {rope_type: default, ...}}'"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Checkpoint(path, config, tokenizer, torch.device(device))


def variants(control: bool, arithmetics: list[Arithmetic]) -> Iterator[tuple[Weights, Arithmetic]]:
    """All combinations that are studied, in order."""
    for weights in Weights if control else (Weights.trained,):
        for arithmetic in arithmetics:
            yield weights, arithmetic


def load(checkpoint: Checkpoint, weights: Weights, arithmetic: Arithmetic, seed: int) -> PreTrainedModel:
    """One variant, ready to be probed: its forward needs `probe=`."""
    probe.register()
    dtype = torch.float32 if arithmetic is Arithmetic.float32 else torch.bfloat16
    if weights is Weights.trained:
        model = load_weights(checkpoint.path, checkpoint.config, dtype=dtype)
    else:
        model = _control(checkpoint, dtype, seed)
    set_rope_dtype(model, RopeDtype.bfloat16 if arithmetic is Arithmetic.bfloat16 else RopeDtype.float32)
    model.set_attn_implementation(probe.NAME)
    return model.to(checkpoint.device).eval()  # type: ignore[arg-type]


def _control(checkpoint: Checkpoint, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Drawn in float32 and rounded to `dtype`, so that every arithmetic has the same weights."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        drawn = AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.config), dtype=torch.float32)
    if dtype is torch.float32:
        return drawn
    # Not drawn.to(dtype): that would round the inverse frequencies of the rotation as well.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.config), dtype=dtype)
    model.load_state_dict(drawn.state_dict())
    return model


# -- emulated bfloat16 ------------------------------------------------------------------------------------------------

aten = torch.ops.aten
PRODUCTS = frozenset((aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default))
"""What linear layers and batched products come to, below autograd."""
NATIVE = ("avx512_bf16", "amx_bf16", "bf16")
"""CPU features with which bfloat16 products are quick."""


class EmulatedBfloat16(TorchDispatchMode):
    """Inside this context, bfloat16 matrix products are computed in float32 and rounded to bfloat16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype is not torch.bfloat16:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return func(*args, **kwargs).to(torch.bfloat16)


def emulates(emulate: Emulate, device: torch.device) -> bool:
    """Whether bfloat16 products are to be emulated on `device`."""
    if emulate is not Emulate.auto:
        return emulate is Emulate.always
    return device.type == "cpu" and not any(torch.cpu.get_capabilities().get(name) for name in NATIVE)


def arithmetic_context(emulated: bool) -> contextlib.AbstractContextManager[Any]:
    """The context to run a bfloat16 model in."""
    return EmulatedBfloat16() if emulated else contextlib.nullcontext()


# -- random queries and keys ------------------------------------------------------------------------------------------


def random_score_changes(
    arithmetic: Arithmetic,
    shifts: Sequence[int],
    *,
    head_dim: int = 128,
    theta: float = 5e5,
    length: int = 1024,
    heads: int = 4,
    seed: int = 0,
) -> list[torch.Tensor]:
    """What the arithmetic does without any weights, on queries and keys rotated by transformers' own code.

    With the defaults (theta is Llama 3's) and shifts from 16 to 130,000 the mean absolute change of the scaled scores
    is 2.5e-6 to 6.0e-4 in float32, 2.3e-3 to 2.7e-3 rotated in float32 and cast once, 3.6e-3 to 4.2e-3 in bfloat16.

    Returns:
        For every shift (heads * length,) float64: each query's mean absolute change of its scaled scores over all keys.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, heads, length, head_dim, generator=generator)  # normal: scores of unit size
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    )
    unshifted = _scores(rotary, query, key, 0, arithmetic)
    return [
        (_scores(rotary, query, key, shift, arithmetic) - unshifted).abs().double().mean(-1).flatten()
        for shift in shifts
    ]


def _scores(
    rotary: LlamaRotaryEmbedding, query: torch.Tensor, key: torch.Tensor, shift: int, arithmetic: Arithmetic
) -> torch.Tensor:
    """(1, H, T, D) twice -> (1, H, T, T) scaled scores, summed in float32."""
    dtype = torch.float32 if arithmetic is Arithmetic.float32 else torch.bfloat16
    rotation = torch.bfloat16 if arithmetic is Arithmetic.bfloat16 else torch.float32
    positions = torch.arange(query.shape[2])[None] + shift
    # The rotary module takes its output dtype from the tensor it is given; an empty one will do.
    cos, sin = rotary(torch.empty(0, dtype=rotation), positions)
    # Rotated in the wider of the two dtypes, then cast to the activations' dtype, as attention receives them.
    query, key = (x.to(dtype).float() for x in apply_rotary_pos_emb(query.to(dtype), key.to(dtype), cos, sin))
    return query @ key.mT * query.shape[-1] ** -0.5
