"""Tiny random models of every supported architecture, and float64 that stays float64, for tests on a CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from anchorctx.models import ModelConfig, load_model

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # transformers' 0.02 leaves so small a model almost linear
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 5}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]} | WINDOW
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
"""Instead of the YaRN that an architecture has by default."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture, and what of it a tiny model exercises."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of its configuration beside `BASE`."""
    window: bool = False
    """Has sliding-window layers."""
    softcap: bool = False
    """Caps attention scores, which not every backend can."""
    grouped: bool = True
    """Fewer key heads than query heads."""
    experts: bool = False
    """A mixture of experts."""
    layered_masks: bool = False
    """transformers takes one attention mask per layer type."""

    def config(self, **options: Any) -> ModelConfig:
        """A `ModelConfig` of the tiny model; `options` are its other fields."""
        base = {k: v for k, v in BASE.items() if self.grouped or k != "num_key_value_heads"}
        return ModelConfig(config={"model_type": self.model_type} | base | self.fields, **options)

    def build(self, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
        """A randomly initialised model, its parameters in `dtype`; `options` are fields of `ModelConfig`."""
        model = load_model(self.config(**options))
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.manual_seed(1)
            for parameter in model.parameters():  # norms' ones and biases' zeros would hide wrong gradients
                parameter.add_(torch.randn_like(parameter) * 0.05)
                parameter.data = parameter.to(dtype)
        if dtype is torch.float64 and self.experts:
            model.set_experts_implementation("eager")  # torch's grouped matmul has no float64
        return model


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama"),
    "mistral": Architecture("mistral", {"sliding_window": None}),
    "mistral_window": Architecture("mistral", WINDOW, window=True),
    "mixtral": Architecture(
        "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, experts=True
    ),
    "qwen2": Architecture("qwen2", layered_masks=True),
    "qwen3": Architecture("qwen3", {"head_dim": 16}, layered_masks=True),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo3", MIXED, window=True, layered_masks=True),
    "gemma2": Architecture(
        "gemma2",
        MIXED
        | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        window=True,
        softcap=True,
        layered_masks=True,
    ),
    "gemma3": Architecture(
        "gemma3_text", MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8}, window=True, layered_masks=True
    ),
    "phi3": Architecture("phi3", {"sliding_window": None}),
    "phi3_window": Architecture("phi3", WINDOW, window=True),
    "gpt_neox": Architecture("gpt_neox", grouped=False),
    "granite": Architecture(
        "granite",
        {"logits_scaling": 4.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
    ),
    "gpt_oss": Architecture(  # attention sinks
        "gpt_oss",
        MIXED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": PLAIN_ROPE},
        window=True,
        experts=True,
        layered_masks=True,
    ),
    "deepseek_v3": Architecture(  # multi-head latent attention: queries and keys of 12 dimensions, values of 8
        "deepseek_v3",
        {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 16, "num_key_value_heads": 4},
        grouped=False,
        experts=True,
    ),
    "cohere2": Architecture("cohere2", MIXED | {"logit_scale": 0.25}, window=True, layered_masks=True),
}
"""Every architecture that is proven, by name."""


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """`size` words, each one token: `<unk>`, `<s>` (BOS, 1), `</s>` (EOS, 2), then w3, w4, ..., split at spaces."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def text_model(
    tokenizer: PreTrainedTokenizerBase,
    reach: int,
    *,
    width: int = 32,
    layers: int = 2,
    spread: float = 0.3,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A random Llama for a tokenizer's vocabulary.

    Args:
        tokenizer: gives the size of the vocabulary, BOS and EOS.
        reach: max_position_embeddings, in tokens.
        width: hidden and intermediate size.
        layers: decoder layers, of two heads each.
        spread: standard deviation of the weights.
        seed: of the weights.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=reach,
        initializer_range=spread,
        bos_token_id=tokenizer.bos_token_id,  # type: ignore[arg-type]
        eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> Path:
    """Write a model with its tokenizer as a Hugging Face folder; returns the folder."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@contextlib.contextmanager
def true_float64() -> Iterator[None]:
    """Inside it float64 tensors stay float64, in backward passes and recomputations too.

    transformers computes norms, softmax and routers in float32, which for a float64 model is a loss of precision: two
    equal computations would differ by 1e-7. In this context a request for float32 on a float64 tensor is not followed.
    (A TorchFunctionMode would not reach what activation checkpointing recomputes.)
    """
    functional = torch.nn.functional
    owners = (*((torch.Tensor, name) for name in ("to", "type", "float", "softmax")), (functional, "softmax"))
    with contextlib.ExitStack() as stack:
        for owner, name in owners:
            stack.enter_context(mock.patch.object(owner, name, _keep_float64(getattr(owner, name))))
        yield


def _keep_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of a tensor, without its requests for float32 when the tensor is float64."""

    @functools.wraps(function)
    def wrapped(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype is not torch.float64:
            return function(tensor, *args, **kwargs)
        if function.__name__ == "float":
            return tensor
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return function(tensor, *args, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})

    return wrapped
