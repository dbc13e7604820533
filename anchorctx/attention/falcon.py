"""Falcon through transformers' attention interface, which its own attention does not ask.

Falcon chooses its attention's class from a table by the implementation's name; `register` puts one there for ours, with
the projections and weights of transformers' own. Its models hand no keyword arguments to their layers either: where
documents lie is kept beside the forward's `position_ids`, as for layers that drop keywords (`attention.keywords`).
Models with ALiBi in the place of RoPE are refused (`attention.architecture`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon import modeling_falcon as falcon

from anchorctx.errors import UserError


class FalconAnchorAttention(falcon.FalconAttention):
    """Falcon's attention, computed by the implementation that is set, if it is one of ours; else as it was."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.LongTensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, hidden) in, ((B, T, hidden), no weights) out; `kwargs` say where documents lie."""
        name = str(self.config._attn_implementation)
        if "flash" in name:
            raise UserError(
                "Falcon's attention cannot be switched to flash attention: load the model with "
                f"attn_implementation='{name}'"
            )
        if not name.startswith("anchor"):
            given = {"position_ids": position_ids, "layer_past": layer_past, "use_cache": use_cache}
            given |= {"output_attentions": output_attentions, "position_embeddings": position_embeddings}
            return super().forward(hidden_states, alibi, attention_mask, **given, **kwargs)
        query, key, value = self.heads(self.query_key_value(hidden_states))
        assert position_embeddings is not None
        query, key = falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS[name]
        out, _ = attention(self, query, key, value, attention_mask, scaling=self.inv_norm_factor, **kwargs)
        return self.dense(out.flatten(2)), None

    def heads(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, n D) -> query (B, Hq, T, D), key and value (B, Hkv, T, D), each key head once.

        Query heads lie in groups, each followed by its key and its value: of 4 heads and 2 key heads q0 q1 k0 v0 q2 q3
        k1 v1. Falcon-7B (`multi_query`) is one group, Falcon-RW as many as heads.
        """
        groups = self.num_kv_heads or self.num_heads
        grouped = fused.unflatten(-1, (groups, self.num_heads // groups + 2, self.head_dim))
        query = grouped[..., :-2, :].flatten(2, 3)
        return query.transpose(1, 2), grouped[..., -2, :].transpose(1, 2), grouped[..., -1, :].transpose(1, 2)


def register(name: str) -> None:
    """Let Falcon be built with the implementation `name`, and switched to it."""
    falcon.FALCON_ATTENTION_CLASSES[name] = FalconAnchorAttention
    # transformers reads Falcon's source to see whether it asks the interface
    falcon.FalconPreTrainedModel._can_set_attn_implementation_cached_value = True


def is_model(module: torch.nn.Module) -> bool:
    """Is it one of Falcon's models, which drop keyword arguments?"""
    return isinstance(module, falcon.FalconPreTrainedModel)


def adopt(module: torch.nn.Module) -> None:
    """Let an attention that was built for another implementation be switched to ours."""
    if type(module) is falcon.FalconAttention:
        module.__class__ = FalconAnchorAttention
