"""Judges models of transformers where they are built, so that nobody has to ask whether a model keeps documents apart.

Most models that would mix documents ask for a mask in their forward pass, and are refused there. Some never ask for
anything: a state-space model takes `layouts=` among its keyword arguments and goes on. torch calls a hook for every
part that a module is given. There a model with our attention is refused while it is built, and one with another
attention, which `set_attn_implementation` may change, is made to refuse layouts. So is a model that keeps documents
apart while it has another attention, which would take `layouts=` and go on without.
"""

from __future__ import annotations

import functools
import gc
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from anchorctx.attention import architecture, falcon
from anchorctx.attention.keywords import hand_on_keywords, keep_keywords
from anchorctx.errors import UserError

_CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


@functools.cache  # once a process
def judge_new_models() -> None:
    """From now on a model that would mix documents raises UserError, also one that was built before.

    It does when it is built with our attention, and later, when it runs with it or is given layouts.
    """
    register_module_module_registration_hook(_judge)
    _watch_built_models()


def _watch_built_models() -> None:
    for found in gc.get_objects():
        if issubclass(type(found), PreTrainedModel):  # isinstance would wake lazy modules
            _watch(found, found)


def _judge(module: Module, name: str, part: Any) -> None:
    if isinstance(module, PreTrainedModel) and isinstance(part, Module):
        if _is_ours(module):
            _refuse(module)
        _watch(module, part)


def _watch(model: PreTrainedModel, part: Module) -> None:
    """Have a model that would mix documents refuse them, and layers of others, in `part`, hand on where they lie."""
    hook = _refuse_layouts
    if _reason(model) is None:
        hook = _check_layouts
        hand_on_keywords(part)
        if falcon.is_model(model):
            keep_keywords(model)
    if hook not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(hook, with_kwargs=True)


def _check_layouts(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("layouts") is None:
        return
    name, mask = type(model).__name__, kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.dtype is not torch.bool and bool((mask > 1).any()):
        # transformers makes it a mask of ones before anything of ours sees it
        raise UserError(f"{name} got layouts= and an attention_mask that numbers documents: pass one of them")
    # two models that are built of one configuration object share what is set of it: the first may lose its attention
    text = architecture.text_config(model.config)
    if not _is_ours(model) and (text is None or not str(text._attn_implementation).startswith("anchor")):
        raise UserError(
            f"{name} got layouts=, which attn_implementation={model.config._attn_implementation!r} would ignore: call "
            "model.set_attn_implementation('anchor'), or build each model from a configuration of its own"
        )


def _refuse_layouts(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _is_ours(model) or kwargs.get("layouts") is not None:  # bloom and mpt keep their attention, with a warning
        _refuse(model)


def _refuse(model: PreTrainedModel) -> None:
    if (reason := _reason(model)) is not None:
        raise architecture.refused(model.config, reason)


def _is_ours(model: PreTrainedModel) -> bool:
    return str(model.config._attn_implementation).startswith("anchor")


def _reason(model: PreTrainedModel) -> str | None:
    """Why `model` is refused, as the end of `model type x ...`; None for others."""
    if type(model).__name__ in _CAUSAL:
        return architecture.refusal(model.config)
    # a model without a head, or a part of another: an exact one may have Whisper's encoder for sound
    reason = architecture.listed(model.config)
    return None if reason == "encoder" else architecture.REASONS.get(reason or "")
