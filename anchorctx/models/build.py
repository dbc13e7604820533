"""A Hugging Face decoder, ready for packed rows: loaded or new, with AnchorAttention, its RoPE settings and dtypes."""

from __future__ import annotations

import difflib
import logging
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from anchorctx.attention.architecture import check_architecture
from anchorctx.attention.interface import check_interface, implementation, register
from anchorctx.attention.kernels.base import Score
from anchorctx.attention.keywords import hand_on_keywords
from anchorctx.attention.registry import BACKENDS, choose
from anchorctx.attention.rope import set_rope_dtype
from anchorctx.errors import UserError
from anchorctx.flops import head_dims, layer_configs
from anchorctx.models.config import ModelConfig
from anchorctx.models.load import load_weights, read_config, reason
from anchorctx.models.rope import apply_rope
from anchorctx.models.settle import settle

logger = logging.getLogger(__name__)

HEAD_FIELDS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The model on the CPU, in training mode, attending through `anchorctx.attention`; its vocabulary is never resized.

    Its forward needs `layouts=`, one a row. Its `config` carries the new maximum length and RoPE settings.

    Raises:
        UserError: nothing at `path`, a model that cannot be used (named, with the reason), settings that contradict.
    """
    register()
    if config.attention != "auto" and config.attention not in BACKENDS:
        raise UserError(f"model.attention={config.attention} is unknown: choose auto, {', '.join(BACKENDS)}")
    hf_config = build_config(config)
    if quantised := getattr(hf_config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise UserError(
            f"model {config.path} is quantised ({method}), and cannot be trained: name the checkpoint in 16 or 32 bits "
            "that it was made of"
        )
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype.value),
        "attn_implementation": implementation(config.attention),
    }
    model = load_weights(config.path, hf_config, **options) if config.path else _new(config, hf_config, options)
    check_interface(model)
    hand_on_keywords(model)
    freeze_other_modalities(model)
    set_rope_dtype(model, config.rope_dtype)
    return model.train()


def build_config(config: ModelConfig) -> PretrainedConfig:
    """The checked transformers configuration, with the new RoPE settings and length; reads no weights."""
    if bool(config.path) == bool(config.config):
        raise UserError("the model needs exactly one of model.path (a checkpoint) and model.config (a new model)")
    hf_config = read_config(config.path) if config.path else _new_config(config.config)
    check_architecture(hf_config)
    for layer in layer_configs(hf_config.get_text_config()):
        _check_heads({name: getattr(layer, name, None) for name in HEAD_FIELDS})
    _set_dropout(hf_config, config.no_dropout)
    apply_rope(hf_config, config.rope, config.max_length, trained=bool(config.path))
    return hf_config


def _set_dropout(config: PretrainedConfig, none: bool) -> None:
    """Take all dropout out where `none` asks for it; UserError where attention has some otherwise."""
    text = config.get_text_config()
    for name, value in {n: v for n, v in vars(text).items() if "drop" in n and isinstance(v, float) and v}.items():
        if none:
            setattr(text, name, 0.0)
        elif "att" in name:  # attention_dropout, attn_pdrop, attention_probs_dropout_prob
            raise UserError(
                f"model type {config.model_type} has {name}={value:g}, which no attention backend computes: set "
                "model.no_dropout=true to train without dropout"
            )


def freeze_other_modalities(model: PreTrainedModel) -> None:
    """Keep what reads images or sound as it is: text alone gives it no gradient, but weight decay would shrink it.

    Nothing for a model of text alone. An export holds the whole model.
    """
    if model.config.get_text_config() is model.config:
        return
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    trained = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in trained]
    for parameter in others:
        parameter.requires_grad_(False)
    if others:
        count = sum(parameter.numel() for parameter in others)
        logger.info("%s: %d weights of images or sound are kept as they are", type(model).__name__, count)


def check_vocabulary(model: PreTrainedModel, tokens: int) -> None:
    """UserError when ids of a tokenizer with `tokens` ids are beyond the model's vocabulary, which is never resized."""
    have = model.config.get_text_config().vocab_size
    if tokens > have:
        raise UserError(
            f"the tokenizer has {tokens} token ids, but the model's vocabulary ends at {have - 1}: "
            "prepare the corpus with the model's own tokenizer, or remove the tokens that were added to it"
        )


def check_attention(model: PreTrainedModel, attention: str, device: torch.device) -> None:
    """BackendUnavailableError when the backend cannot serve this model's calls on `device`; before anything is run."""
    config = model.config.get_text_config()
    heads, dim = config.num_attention_heads, max(head_dims(config))  # a kernel that takes one takes the larger
    softcap = getattr(config, "attn_logit_softcapping", None)
    # An empty call of the model's shape: the choice depends on dtype, device, head dimension and soft-capping alone.
    choose(attention, torch.empty(1, heads, 1, dim, dtype=model.dtype, device=device), Score(dim**-0.5, None, softcap))


def checkpoint_activations(model: PreTrainedModel, *, every: int = 1, use_reentrant: bool = False) -> None:
    """Recompute every n-th decoder layer in the backward pass instead of keeping its activations; 1 is all of them."""
    name = "activation_checkpointing_enable"  # until transformers 5.20: gradient_checkpointing_enable
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # every=2 of 5 layers: layers 0, 2 and 4 are recomputed
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every == 0


def _new_config(fields: dict[str, Any]) -> PretrainedConfig:
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise UserError("model.config needs model_type, for example model_type: llama")
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise UserError(
            f"model.config.model_type={model_type} is unknown to transformers: use llama, qwen3 ..."
        ) from error
    known = set(default.to_dict()) | set(default.attribute_map)
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "see its transformers configuration class for the valid ones"
            raise UserError(f"model.config.{name} is not a field of {model_type}: {hint}")
    _check_heads({"head_dim": _own_head_dim(layer_configs(default.get_text_config())[0])} | fields)
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.config is not a valid {model_type} configuration: {reason(error)}") from error
    settle(config)
    return config


def _own_head_dim(config: PretrainedConfig) -> int | None:
    """The head dimension where the architecture sets one, None where it follows from the hidden size."""
    hidden, heads, _, dim = (getattr(config, name, None) for name in HEAD_FIELDS)
    return None if dim and hidden and heads and dim == hidden // heads else dim


def _check_heads(fields: dict[str, Any]) -> None:
    """Before transformers builds the configuration, whose own errors leave the values out; missing fields pass."""
    hidden, heads, groups, width = (fields.get(name) for name in HEAD_FIELDS)
    if not all(isinstance(value, int | None) for value in (hidden, heads, groups, width)) or not heads:
        return
    if groups and heads % groups:
        raise UserError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}: change one")
    if width is None and hidden and hidden % heads:
        raise UserError(f"hidden_size={hidden} must be a multiple of num_attention_heads={heads}: change one")


def _new(config: ModelConfig, hf_config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    devices = list(range(torch.cuda.device_count()))
    try:
        # Weights follow from config.seed alone, and the caller's random states stay as they were.
        with torch.random.fork_rng(devices):
            torch.manual_seed(config.seed)
            return AutoModelForCausalLM.from_config(hf_config, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"model.config cannot be built: {reason(error, first=True)}") from error
