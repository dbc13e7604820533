"""`attend` as an attention implementation of transformers: `attn_implementation="anchor"`, no file patched.

A model's forward hands keyword arguments through to the attention function, so `model(ids, position_ids=...,
layouts=layouts)` reaches `attend`. Other trainers' batches say where documents lie by `cu_seq_lens_q`, which
transformers' own flash attention takes too. A call with neither raises: a mask must never vanish silently.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from anchorctx.attention import falcon
from anchorctx.attention.architecture import REASONS, REMEDY, check_architecture, check_documents, is_known
from anchorctx.attention.boundaries import layouts_of
from anchorctx.attention.construction import judge_new_models
from anchorctx.attention.registry import BACKENDS, attend
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout

NOT_COMPUTED = ("sinks", "position_bias", "indices", "block_indices")
"""Arguments by which models of transformers change the scores: sinks of each token, biases, chosen keys. None of them
may vanish silently. Sinks of each head come as `s_aux`, which is computed."""


def register() -> None:
    """Add `anchor` (the best backend here) and one name a backend to transformers' attention implementations.

    Idempotent. Load or configure a model with `attn_implementation="anchor"` afterwards.
    """
    judge_new_models()
    # The mask function makes none: transformers would build (B, 1, T, T) where it finds no such function.
    for backend in ("auto", *BACKENDS):
        name = implementation(backend)
        AttentionInterface.register(name, partial(_anchor_forward, backend=backend))
        AttentionMaskInterface.register(name, _no_mask)
        falcon.register(name)


def implementation(backend: str = "auto") -> str:
    """The `attn_implementation` name under which `backend` is registered.

    transformers takes any name with `flash` in it for a kernel of its own, to be found on the hub.
    """
    return "anchor" if backend == "auto" else f"anchor_{backend.replace('flash_attn', 'fa')}"


def check_interface(model: Any) -> None:
    """UserError for a model whose attention never asks transformers' interface, and so would never hear of a layout."""
    if is_known(model.config):
        return
    inner = getattr(model, "base_model", model)  # PEFT's wrapper
    inner = getattr(inner, "model", inner)
    if any(getattr(found, "_supports_attention_backend", None) is False for found in (model, inner)):
        raise UserError(f"{type(model).__name__} {REASONS['own_attention']}: {REMEDY}")


def _no_mask(
    *args: Any,
    attention_mask: torch.Tensor | None = None,
    config: PretrainedConfig | None = None,
    **kwargs: Any,
) -> None:
    """The layout is the mask; one that hides tokens beside it is refused, for it would vanish silently.

    transformers asks for a mask with every forward pass, so that a model that would mix documents is refused here
    whichever way it was loaded.
    """
    if config is not None:
        check_architecture(config)
    if attention_mask is not None and not bool(attention_mask.all()):
        hidden = int((attention_mask == 0).sum())
        raise UserError(
            f"attention_mask hides {hidden} tokens, but the layout is the mask: pass layouts (or cu_seq_lens_q) of "
            "rows without padding, and no attention_mask"
        )


def _anchor_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    backend: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layouts: tuple[PackedLayout, ...] | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention contract: (B, H, T, D) in, ((B, T, Hq, D), no weights) out."""
    name = type(module).__name__
    if layouts is not None and cu_seq_lens_q is not None:
        raise UserError(f"{name} got layouts= and cu_seq_lens_q=, which both say where documents lie: pass one of them")
    if layouts is None:
        layouts = layouts_of(name, query.shape[0], query.shape[2], cu_seq_lens_q)
    if attention_mask is not None:
        raise UserError(f"{name} got an attention mask beside layouts: the layout is the mask, pass only layouts")
    if dropout and module.training:
        raise UserError(f"{name} asks for attention dropout {dropout}, which no backend computes: set it to 0")
    for word in NOT_COMPUTED:
        if kwargs.get(word) is not None:
            raise UserError(f"{name} hands {word} to its attention, which no backend computes: use another model")
    if isinstance(config := getattr(module, "config", None), PretrainedConfig):
        check_documents(config, layouts)
    query, key, value = together(module, query, key, value)
    options: dict[str, Any] = {"scale": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
    out = attend(query, key, value, layouts, **options, backend=backend)
    return out.transpose(1, 2).contiguous(), None  # no copy for kernels; some models (JetMoE) ask for it by view()


def together(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values in the dtype in which `module` projects: rotation in float32 leaves q and k in float32.

    It is the values' own, but transformers' cache (to 5.20) gives values the dtype of the keys that were put in first:
    then it is the weights'. Both casts are exact there, of what was rounded before, or the one that is due (q and k).
    """
    weights = next((p.dtype for p in module.parameters() if p.is_floating_point()), value.dtype)
    dtype = min(value.dtype, weights, key=lambda d: d.itemsize)  # under autocast the weights' is the wider
    return query.to(dtype), key.to(dtype), value.to(dtype)
