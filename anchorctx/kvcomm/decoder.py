"""One RoPE decoder as KVCOMM sees it: the only place that touches transformers' cache classes. Nothing is patched.

A `Buffer` holds a whole prompt's rotated KV. Entries that are reused are written into it; the model then runs on the
remaining tokens only, wherever they stand, and its new keys and values land in their own slots. One forward therefore
serves every arm: dense (all tokens), prefix caching (a suffix), a single last token, or scattered tokens.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from anchorctx.errors import UserError
from anchorctx.flops import layer_windows
from anchorctx.kvcomm import grouped, memory
from anchorctx.kvcomm.cache import KV
from anchorctx.kvcomm.rope import Rope
from anchorctx.kvcomm.scatter import Filled, RowCache, ScatterCache

ATTENTION = ("sdpa", "eager", grouped.NAME)
"""Implementations that take the mask which scattered tokens need."""
CHUNK = 512
"""Tokens that a suffix is run in: its masked attention computes the chunk's whole rectangle, not a triangle."""

KINDS = ("full_attention", "sliding_attention")
"""Layers whose caches are keys and values of single tokens."""
_PROBED = 11
"""Places by which the check on a model's rotation moves its two tokens."""


class Buffer:
    """Rotated keys and values of one prompt, with room for what is generated; slots are token places in the prompt."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values
        """(L, B, H, capacity, D)."""

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.keys.shape[3]

    def kv(self, start: int, stop: int, position: int | None = None) -> KV:
        """The slots `start` to `stop`, a view; `position` of the first one where it is not the slot itself."""
        at = start if position is None else position
        return KV(self.keys[:, :, :, start:stop], self.values[:, :, :, start:stop], at)


class Decoder:
    """A model, its rotation and its limits; refuses, by name, models whose KV cannot be moved."""

    def __init__(self, model: PreTrainedModel) -> None:
        name, config = type(model).__name__, model.config.get_text_config()
        windows = _windows(model)
        if config._attn_implementation not in ATTENTION:
            raise UserError(
                f"{name} uses attn_implementation={config._attn_implementation}, which takes no mask for scattered "
                f"tokens: load the model with attn_implementation={' or '.join(ATTENTION)}"
            )
        self.reach: int = getattr(config, "max_position_embeddings", None) or 2**31
        """Tokens that a prompt and its answer may have together."""
        self.model, self.rope = model, Rope.of(model, self.reach)
        self._cache_name = _cache_argument(model)
        self.layers: int = config.num_hidden_layers
        # Layers of one kind take one mask, those of several a mask for each kind, by its name.
        mixed = len(set(windows)) > 1
        self._windows = dict(zip(config.layer_types, windows, strict=True)) if mixed else {"": windows[0]}
        self._head_shape = self._probe() if model.device.type != "meta" else (0, 0, 0)  # shapes cannot be run

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the KV entries."""
        return self.model.dtype

    def buffer(self, capacity: int, batch: int = 1) -> Buffer:
        """An empty buffer; what is never written is never read."""
        # empty, not zeros: every slot is written before anything attends to it.
        heads, key_dim, value_dim = self._head_shape
        shape = (self.layers, batch, heads, capacity)
        keys, values = (memory.empty((*shape, dim), self.dtype, self.device) for dim in (key_dim, value_dim))
        return Buffer(keys, values)

    def tensor(self, ids: Sequence[int]) -> torch.Tensor:
        """(1, T) token ids on the model's device."""
        return torch.tensor([list(ids)], dtype=torch.long, device=self.device)

    @property
    def vocabulary(self) -> int:
        """Tokens that it has an embedding for."""
        return int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[union-attr, arg-type]

    def embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden) input embeddings."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(ids)

    @torch.no_grad()
    def forward(
        self,
        ids: torch.Tensor,
        buffer: Buffer,
        slots: range | torch.Tensor,
        *,
        shift: int = 0,
        keep: int = 1,
    ) -> torch.Tensor:
        """Run tokens and write their KV into the buffer; returns logits (B, keep, vocabulary) of the last `keep`.

        Args:
            ids: (B, S) tokens.
            buffer: what they attend to: every slot up to their own.
            slots: where they stand, increasing; a range for neighbours.
            shift: positions are slots plus this; -1 puts them one position earlier than their slots say.
            keep: how many of the last tokens' logits are wanted; 0 gives none.
        """
        # A range from slot 0 is a plain causal prompt, for which attention needs no mask and no chunks.
        if isinstance(slots, range) and slots.start and len(slots) > CHUNK:
            return self._chunked(ids, buffer, slots, shift, keep)
        out = self._run(ids, buffer, slots, shift, max(keep, 1), self.layers)
        return out.logits[:, out.logits.shape[1] - keep :]

    @torch.no_grad()
    def forward_rows(self, ids: torch.Tensor, buffer: Buffer, slots: torch.Tensor) -> torch.Tensor:
        """Run one token in each of the buffer's first rows, each in a slot of its own; returns logits (n, vocabulary).

        Args:
            ids: (n,) tokens.
            buffer: of n rows or more, which hold different prompts.
            slots: (n,) where they stand, and their positions; each sees its row's slots up to its own.
        """
        stop = int(slots.max()) + 1
        # Slots [5, 2]: rows 0 0 0 0 0 0 and 0 0 0 - - -, with - for the lowest number of the dtype.
        mask = self._mask(slots, stop, rows=True)
        cache = RowCache(buffer.keys, buffer.values, slots, stop)
        given = {"attention_mask": mask, "position_ids": slots[:, None], self._cache_name: cache}
        return self.model(input_ids=ids[:, None], use_cache=True, logits_to_keep=1, **given).logits[:, -1]

    @torch.no_grad()
    def fill(self, ids: torch.Tensor, buffer: Buffer, slots: range, layers: int) -> None:
        """Run neighbours through the first layers alone, until those have their KV in the buffer; there are no logits.

        What is behind the last one's keys and values is not computed: its cache ends the forward.
        """
        for first in range(0, len(slots), CHUNK):
            with contextlib.suppress(Filled):
                self._run(ids[:, first : first + CHUNK], buffer, slots[first : first + CHUNK], 0, 1, layers)

    def _run(
        self, ids: torch.Tensor, buffer: Buffer, slots: range | torch.Tensor, shift: int, keep: int, layers: int
    ) -> Any:
        where = torch.arange(slots.start, slots.stop) if isinstance(slots, range) else slots
        where = where.to(self.device)
        stop = int(slots[-1]) + 1
        cache = ScatterCache(buffer.keys, buffer.values, slots if isinstance(slots, range) else where, stop, layers)
        # Slots [2, 5, 7]: the new KV goes to these places, and each token sees the slots up to its own, of 8 in all.
        mask = None if isinstance(slots, range) else self._mask(where, stop)
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(where + shift)[None].expand(ids.shape[0], -1),
            use_cache=True,
            logits_to_keep=keep,
            **{self._cache_name: cache},
        )

    def _chunked(self, ids: torch.Tensor, buffer: Buffer, slots: range, shift: int, keep: int) -> torch.Tensor:
        found = []
        for first in range(0, len(slots), CHUNK):
            part = slots[first : first + CHUNK]
            # keep 700 of 1,200 tokens in chunks of 512, 512 and 176: the last 12, 512 and 176 of each.
            wanted = min(max(keep - (slots.stop - part.stop), 0), len(part))
            found.append(self.forward(ids[:, first : first + CHUNK], buffer, part, shift=shift, keep=wanted))
        return torch.cat(found, dim=1)

    def encode(self, ids: torch.Tensor, *, position: int = 0, behind: KV | None = None) -> KV:
        """The rotated KV of `ids` (B, T) from `position` on, which see `behind` (such as an anchor) and themselves."""
        # `behind` takes the slots 0 .. ahead - 1, and `ids` follow; their positions are slots + shift, which need not
        # continue those of `behind`.
        ahead = 0 if behind is None else behind.length
        buffer = self.buffer(ahead + ids.shape[1], ids.shape[0])
        if behind is not None:
            buffer.keys[:, :, :, :ahead], buffer.values[:, :, :, :ahead] = behind.keys, behind.values
        self.forward(ids, buffer, range(ahead, buffer.capacity), shift=position - ahead, keep=0)
        return buffer.kv(ahead, buffer.capacity, position)

    def from_cache(self, cache: Cache, first: int = 0) -> KV:
        """A finished cache's entries, rotated, from position `first` on; a copy."""
        layers: Any = cache.layers
        keys, values = (torch.stack([getattr(layer, part) for layer in layers]) for part in ("keys", "values"))
        return KV(keys, values, first)

    def _mask(self, where: torch.Tensor, stop: int, *, rows: bool = False) -> torch.Tensor | dict[str, torch.Tensor]:
        """(1, 1, S, stop), additive: each token sees the slots up to its own, or so many of them as a window holds; by
        kind of layer where kinds differ. In the model's dtype, so that no layer has to convert it; grouped attention
        needs its rows once for every query head of a group. With `rows` (S, 1, 1, stop), for tokens of S prompts."""
        # where [2, 5], stop 6: rows 0 0 0 - - - and 0 0 0 0 0 0, with - for the lowest number of the dtype; a window of
        # 3 makes the second one - - - 0 0 0.
        copies = grouped.copies(self.model)
        own = where[:, None] if rows else where.repeat(copies)[:, None]
        slots = torch.arange(stop, device=where.device)[None, :]
        masks = {}
        for kind, window in self._windows.items():
            hidden = slots > own if window is None else (slots > own) | (slots <= own - window)
            zeros = torch.zeros(hidden.shape, dtype=self.dtype, device=where.device)
            filled = zeros.masked_fill_(hidden, torch.finfo(self.dtype).min)
            masks[kind] = filled[:, None, None].expand(-1, -1, copies, -1) if rows else filled[None, None]
        return masks.get("", masks)

    def _two_tokens(self, first: int) -> DynamicCache:
        """The cache of two tokens at positions `first` and the next."""
        positions, cache = torch.tensor([[first, first + 1]], device=self.device), DynamicCache()
        ids = self.tensor([1, 2])
        self.model(input_ids=ids, position_ids=positions, use_cache=True, **{self._cache_name: cache})
        return cache

    @torch.no_grad()
    def _probe(self) -> tuple[int, int, int]:
        """Heads and head dimensions; finds how the model rotates its keys, which is checked on two tokens."""
        name = type(self.model).__name__
        try:
            caches = [self._two_tokens(first) for first in (0, _PROBED)]
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"{name} cannot be run on a plain cache of keys and values ({error}), so its caches cannot be shared: "
                "use a model like Llama, Qwen or Mistral"
            ) from None
        layers: Any = caches[0].layers
        shapes = {(layer.keys.shape, layer.values.shape) for layer in layers}
        if len(layers) != self.layers or len(shapes) != 1:
            raise UserError(f"{name} does not cache the same keys in each layer: use a model whose layers are alike")
        here, there = (self.from_cache(cache, first) for cache, first in zip(caches, (0, _PROBED), strict=True))
        self.rope.find(here, there)
        return here.keys.shape[2], here.keys.shape[4], here.values.shape[4]


def _windows(model: PreTrainedModel) -> tuple[int | None, ...]:
    """Each layer's window in tokens, None for none; UserError for a model whose layers keep or see something else."""
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    strange = next((kind for kind in kinds if kind not in KINDS), None)
    if strange is not None or not hasattr(config, "num_hidden_layers"):
        raise UserError(
            f"{name} has {strange or 'nested'} layers, which do not keep each token's keys and values for all later "
            "tokens: use a model of full or sliding-window attention"
        )
    windows = layer_windows(config)
    # Moshi declares a window that it takes for flash attention alone.
    if any(windows) and not hasattr(sys.modules[type(model).__module__], "create_sliding_window_causal_mask"):
        raise UserError(
            f"{name} has a sliding window that transformers' masks do not know, so that scattered tokens cannot be "
            "given theirs: use a model like Mistral, Gemma or Qwen"
        )
    return windows


def _cache_argument(model: PreTrainedModel) -> str:
    """The forward argument that takes a cache: `past_key_values` until transformers renamed it `cache`."""
    accepted = inspect.signature(model.forward).parameters
    return "cache" if "cache" in accepted else "past_key_values"
