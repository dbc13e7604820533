"""The precision of rotary position embeddings, for any transformers decoder, without touching a library file.

transformers computes the rotation angles in float32, casts their cosines and sines to the activations' dtype and
rotates in it. In bfloat16 this breaks the property that RoPE is relative (arXiv 2411.13476, section 3).

`float32` calls each rotary module with an empty float32 tensor in the activations' place, of which it reads only the
dtype and device. Its cosines and sines then come out in float32, transformers' own rotation promotes q and k to
float32, and `anchorctx.attention.interface` casts them to the values' dtype, once. On a card one kernel does all of it
(`anchorctx.attention.rotation`).

`bfloat16_emulated` has the modules that make q and k hand them out in bfloat16, and asks the rotary modules for
bfloat16: transformers then rotates, and differentiates the rotation, as it does in a bfloat16 model.

Known departures in transformers' own rotation (5.24): OLMo 2 and OLMo 3 always take float32 cosines and sines, so both
settings are the same for them; Cohere 2 rotates in float32 and OLMo 2 and 3 promote, but all three cast q and k back to
the activations' dtype themselves: still one cast, a little earlier.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from anchorctx.attention import rotation
from anchorctx.attention.config import RopeDtype
from anchorctx.errors import UserError

LENGTH_BOUND = ("dynamic", "longrope")
"""Scalings whose angles depend on the longest position in sight: of the row, of the prompt, or of a part of either."""
EXACT = (torch.float32, torch.float64)
"""Dtypes that inverse frequencies may have."""


def set_rope_dtype(model: torch.nn.Module, rope_dtype: RopeDtype) -> None:
    """Set the rotation's dtype in every rotary module of `model`; idempotent and reversible.

    Adds no parameter, buffer or hook; a deep copy or a pickled copy of the model keeps the setting.

    Raises:
        UserError: the model has no rotary module.
    """
    modules = rotary_modules(model)
    if not modules:
        raise UserError(f"{type(model).__name__} has no rotary position embeddings: use a RoPE decoder")
    makers = _makers(model)
    if rope_dtype is RopeDtype.bfloat16_emulated and not makers:
        raise UserError(
            f"{type(model).__name__} has no q_proj and k_proj whose output could be rounded: use rope_dtype=bfloat16 "
            "with a bfloat16 model, or a model that has them, such as llama"
        )
    for module in [*modules, *makers]:
        _unwrap(module)
    rotation.unhook(model)
    if rope_dtype is RopeDtype.float32:
        rotation.hook(model)
    for module in modules:
        if rope_dtype is not RopeDtype.bfloat16:
            dtype = torch.float32 if rope_dtype is RopeDtype.float32 else torch.bfloat16
            _wrap(module, _asked_for, dtype)
    if rope_dtype is RopeDtype.bfloat16_emulated:
        for module in makers:
            _wrap(module, _rounded_forward)


def _wrap(module: torch.nn.Module, forward: Callable[..., Any], *settings: Any) -> None:
    """Put `forward(module, inner, *settings, ...)` around the module's own, inside of what accelerate put around it.

    accelerate brings offloaded weights before it calls `_old_forward`; outside of it they would not be there. `inner`
    is None where the class's own forward is next.
    """
    slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    setattr(module, slot, partial(forward, module, module.__dict__.get(slot), *settings))


def _unwrap(module: torch.nn.Module) -> None:
    """Undo `_wrap`, and nothing that others did to the module's forward."""
    for slot in ("forward", "_old_forward"):
        current = module.__dict__.get(slot)
        if not isinstance(current, partial) or current.func not in (_asked_for, _rounded_forward):
            continue
        inner = current.args[1]
        if inner is None and slot == "forward":
            del module.forward
        else:  # accelerate calls its own attribute, and would miss it
            setattr(module, slot, inner or type(module).forward.__get__(module))


def _makers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose outputs are rotated: each attention's norms of queries and keys, or else its projections."""
    found = []
    for module in model.modules():
        for name in ("q", "k"):
            children = (getattr(module, f"{name}_{kind}", None) for kind in ("norm", "proj"))
            found += [child for child in children if isinstance(child, torch.nn.Module)][:1]
    return found


def rotary_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that turn position ids into cosines and sines: they hold inverse frequencies, or a table (GPT-J)."""
    return [module for module in model.modules() if _frequencies(module)]


@contextlib.contextmanager
def row_in_sight(model: torch.nn.Module, tokens: int | None) -> Iterator[None]:
    """Inside, `LENGTH_BOUND` scalings take the angles of a row of so many tokens, whatever positions they are given.

    So a row's pieces are rotated as the row is. None changes nothing.
    """
    bound = [module for module in rotary_modules(model) if tokens is not None and _length_bound(module)]
    before = [module.__dict__.get("forward") for module in bound]
    for module, forward in zip(bound, before, strict=True):
        forward = forward or partial(type(module).forward, module)
        module.forward = partial(_with_last_position, forward, (tokens or 1) - 1)
    try:
        yield
    finally:
        for module, forward in zip(bound, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _length_bound(module: torch.nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)  # of each kind of layer where these differ
    return any(kind in LENGTH_BOUND for kind in (kinds.values() if isinstance(kinds, dict) else (kinds,)))


def _with_last_position(
    forward: Any, last: int, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """A rotary module's cosines and sines (B, T, R), made with the row's last position at the end, which is dropped."""
    seen = torch.nn.functional.pad(position_ids, (0, 1), value=last)
    return tuple(angles[..., :-1, :] for angles in forward(x, seen, *args, **kwargs))


def restore_frequencies(model: torch.nn.Module) -> None:
    """Make frequencies that were rounded while the model was built anew, in float32.

    DeepSpeed's `zero.Init` casts every tensor that is made inside it, these too; transformers keeps it from doing so
    by itself in 5.24, but not yet in 5.17. Rounded to bfloat16, angles are wrong by radians at long distances.
    """
    for module in rotary_modules(model):
        if all(frequencies.dtype in EXACT for frequencies in _frequencies(module).values()):
            continue
        fresh = type(module)(getattr(module, "config", model.config))  # type: ignore[call-arg, arg-type]
        for name, rounded in _frequencies(module).items():
            module._buffers[name] = getattr(fresh, name).to(rounded.device)


def _frequencies(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    table = "embed_positions" if "Rotary" in type(module).__name__ else None
    return {n: x for n, x in module._buffers.items() if (n.endswith("inv_freq") or n == table) and x is not None}


def _rounded_forward(
    module: torch.nn.Module, inner: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The module's own forward, rounded to bfloat16."""
    return _next(module, inner)(*args, **kwargs).to(torch.bfloat16)


def _asked_for(
    module: torch.nn.Module,
    inner: Callable[..., Any] | None,
    dtype: torch.dtype,
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The rotary module's own forward, asked for `dtype`."""
    for name, frequencies in _frequencies(module).items():
        if frequencies.dtype not in EXACT:
            # A blanket model.to(bfloat16) rounds them: the angles would be wrong by radians at long distances.
            raise RuntimeError(f"{name} was cast to {frequencies.dtype}: load the model in its dtype, do not cast it")
    with _exact_matmul():
        return _next(module, inner)(x.new_empty(0, dtype=dtype), *args, **kwargs)


def _next(module: torch.nn.Module, inner: Callable[..., Any] | None) -> Callable[..., Any]:
    return inner or partial(type(module).forward, module)


@contextlib.contextmanager
def _exact_matmul() -> Iterator[None]:
    """No TF32: older transformers multiply positions by frequencies in a matmul, where TF32 keeps only 11 bits.

    Set through the backend's own switch, because torch's global one raises where a user has mixed both.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
