"""Decoder layers that drop the forward's keyword arguments: two hooks hand them on to their attention.

Nemotron's and StableLM's layers call `self.self_attn(...)` with arguments by name and without `**kwargs`, so that a
layout never gets there. A hook on the layer keeps what came in beside the layer's `position_ids`, and one on its
attention finds it by the `position_ids` that the layer does hand on. The tensor stands for this one call of the layer:
a layer that is computed again for the backward pass finds the same.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.modeling_layers import GradientCheckpointingLayer

from anchorctx.attention import falcon
from anchorctx.errors import UserError

KEYWORDS = ("layouts", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What says where documents lie."""

_beside: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""A layer call's position_ids, by identity, to what the layer was given of `KEYWORDS`."""


def hand_on_keywords(model: torch.nn.Module) -> None:
    """Hook what drops keyword arguments in `model`, layers or Falcon's models; idempotent, nothing for others.

    Llama 4 scales queries by their index in the row, which for documents that fit in its chunks is a factor of 1 when
    they are alone (`architecture.check_documents`): a hook switches it off for packed rows, and on for others.
    """
    for module in model.modules():
        scales = getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale")
        if scales and _scale_unpacked not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_scale_unpacked, with_kwargs=True)
        falcon.adopt(module)
        if falcon.is_model(module):
            keep_keywords(module)
    for layer, attention in _unhooked(model):
        layer.register_forward_pre_hook(_keep, with_kwargs=True)
        attention.register_forward_pre_hook(_hand_on, with_kwargs=True)


def keep_keywords(model: torch.nn.Module) -> None:
    """Hook a model that hands no keyword arguments to its layers, so that their attention finds them; idempotent."""
    if _keep not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_keep, with_kwargs=True)


def kept(model: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which to call the forward of a model behind its hooks: what these would have done is done."""
    found = _keep(model, (), kwargs) if falcon.is_model(model) else None
    return kwargs if found is None else found[1]


def check_keywords(model: torch.nn.Module) -> None:
    """UserError for a model whose layers drop keyword arguments, unless they are hooked."""
    if any(_unhooked(model)):
        raise UserError(
            f"{type(model).__name__}'s layers drop the arguments that say where documents lie: call "
            "anchorctx.attention.hand_on_keywords(model) first"
        )


def _unhooked(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
    """Each layer that drops keyword arguments, with its attention."""
    for layer in list(model.modules()):
        if isinstance(layer, GradientCheckpointingLayer) and _keep not in layer._forward_pre_hooks.values():
            found = (getattr(layer, name, None) for name in dropping(type(layer).forward))
            yield from ((layer, attention) for attention in found if isinstance(attention, torch.nn.Module))


@functools.lru_cache(maxsize=1024)
def dropping(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The attributes that a layer's forward calls with `position_ids` and without `**kwargs`, though it has them."""
    forward = inspect.unwrap(forward)
    if "kwargs" not in getattr(getattr(forward, "__code__", None), "co_varnames", ()):
        return ()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):  # no source, or none that stands alone
        return ()
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return tuple(
        call.func.attr
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "self"
        and {word.arg for word in call.keywords} >= {"position_ids"}
        and None not in {word.arg for word in call.keywords}
    )


def _scale_unpacked(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # set in front of each call, and not set back behind it: a call that is broken off leaves nothing wrong
    wanted = all(kwargs.get(name) is None for name in KEYWORDS)
    if attention.attn_temperature_tuning is not wanted:
        attention.attn_temperature_tuning = wanted


def _keep(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = {name: kwargs[name] for name in KEYWORDS if kwargs.get(name) is not None}
    positions = kwargs.get("position_ids")
    if not given or positions is None:
        return None
    positions = positions.view_as(positions)
    _beside[positions] = given
    return args, kwargs | {"position_ids": positions}


def _hand_on(attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    positions = kwargs.get("position_ids")
    given = None if positions is None else _beside.get(positions)
    return None if given is None else (args, kwargs | given)
