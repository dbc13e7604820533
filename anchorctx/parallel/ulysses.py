"""Sequence parallelism by heads (DeepSpeed-Ulysses, 2309.14509), through DeepSpeed's own registration.

Outside attention each process holds T/SP tokens of a row. Before attention an all-to-all trades tokens for heads, so
that each process attends over all T tokens with Hq/SP heads, by `anchorctx.attention` and its layouts; after it, back.
Key heads fewer than SP are replicated. Only documents that are longer than a piece are shared like this: a batch that
one process has for itself, told by the length of its layout, passes by the exchange. Per layer and direction a process
sends, to the others of its group,

    (SP-1)/SP * T/SP * D * bytes * (2 Hq + 2 max(Hkv, SP))        (q, k, v out, the output back)

DeepSpeed calls the group a `mpu` and would take it in `deepspeed.initialize`. We do not pass it on: ZeRO 1 and 2 would
then *sum* gradients over the group, while ZeRO 3 goes on averaging over all processes, and checkpoints would be named
as if the weights were split over it. Without it every stage averages over all processes, and one rule (the loss is
scaled by the number of processes) gives the gradient of one process at every stage; tests compare the norm itself.

Queries and keys that were rotated in float32 are cast before the exchange, not after it: half the bytes. Of attention
sinks a process takes those of its heads; their gradients add up over processes like those of weights. DeepSpeed knows
one head dimension: narrower values (multi-head latent attention) travel with zeros behind them, and so does the output.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from anchorctx.attention.kernels.base import widened
from anchorctx.attention.rope import LENGTH_BOUND
from anchorctx.errors import UserError
from anchorctx.flops import head_dims, layer_configs
from anchorctx.parallel.mesh import Mesh, check_heads

WRONG_CORES = {
    "sdpa": "it ignores the layouts, so that documents of a row would see each other",
    "eager": "it holds a T x T mask, and DeepSpeed refuses it",
    "flex_attention": "DeepSpeed replaces its mask by a plain causal one, so that documents would see each other",
}
"""Attention of transformers that runs under Ulysses without an error, and is wrong for packed rows."""


def key_heads(config: PretrainedConfig) -> int:
    """Key and value heads; as many as query heads where the architecture does not group them; the fewest of a layer."""
    return min(getattr(x, "num_key_value_heads", None) or x.num_attention_heads for x in layer_configs(config))


def check_sizes(config: PretrainedConfig, sequence: int, world: int | None = None) -> None:
    """UserError when `sequence` processes cannot share this model's rows; names the nearest number that can."""
    if sequence == 1:
        return
    text = config.get_text_config()
    check_heads(text.num_attention_heads, key_heads(text), sequence, world)
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    kind = next((part["rope_type"] for part in parts if part.get("rope_type") in LENGTH_BOUND), None)
    if kind is not None:
        raise UserError(
            f"model.rope.type={kind} cannot run under sequence parallelism: its angles depend on the row's length, of "
            "which each process sees a slice; use yarn, llama3 or a larger theta"
        )


def check_alike(model: PreTrainedModel) -> None:
    """UserError for a model whose layers have different key heads or head dimensions (MiMo, Gemma 4).

    DeepSpeed exchanges one shape for all layers.
    """
    # as transformers names them: query heads a key head, and the dimension of a head
    names = ("num_key_value_groups", "head_dim")
    attentions = [m for m in model.get_decoder().modules() if all(hasattr(m, name) for name in names)]
    sizes = sorted({tuple(getattr(module, name) for name in names) for module in attentions})
    if len(sizes) > 1:
        shown = " and ".join(f"{groups} query heads a key head of {dim}" for groups, dim in sizes)
        raise UserError(
            f"{type(model).__name__} has layers with {shown}, which parallel.sequence_parallel cannot exchange: set it "
            "to 1"
        )


def check_core(name: str) -> None:
    """UserError when an attention of this name would be wrong under sequence parallelism, with the reason."""
    if not name.startswith("anchor"):
        why = WRONG_CORES.get(name, "it knows nothing of layouts")
        raise UserError(f"attention '{name}' cannot run under sequence parallelism: {why}; use model.attention=auto")


def enable(model: PreTrainedModel, mesh: Mesh) -> None:
    """Let attention exchange tokens for heads within this process's group, where it shares them; see `release`."""
    if mesh.sequence == 1:
        return
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    core = model.config._attn_implementation
    assert core is not None
    check_core(core)
    check_sizes(model.config, mesh.sequence, mesh.ranks.world)
    check_alike(model)
    alone = ALL_ATTENTION_FUNCTIONS[core]
    UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=_facts(model.config, core),
        core_attn_implementation=core,
        sequence_parallel_size=mesh.sequence,
        micro_batch_size=1,
        seq_length_is_variable=True,
    )
    ALL_ATTENTION_FUNCTIONS[core] = _where_shared(ALL_ATTENTION_FUNCTIONS[core], alone, mesh)


def release() -> None:
    """Give every model its own attention back, and forget the groups."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    wrapped = [name for name in ALL_ATTENTION_FUNCTIONS if hasattr(ALL_ATTENTION_FUNCTIONS[name], "exchanges")]
    # what was registered for all models lies beneath
    for name in wrapped:
        del ALL_ATTENTION_FUNCTIONS[name]
    parallel_state_sp._release_sequence_parallel_groups()


def bytes_sent(
    *, tokens: int, heads: int, kv_heads: int, head_dim: int, element: int, sequence: int, rows: int = 1
) -> int:
    """Bytes that a process sends to others in one layer's forward pass (as many again backward); see the module."""
    if sequence == 1:
        return 0
    # A row of 65,536 over 8 processes, 32 heads and 8 key heads of 128 in bfloat16:
    # 8,192 * 128 * 2 bytes * (64 + 16) * 7/8 = 146.8 MB
    local = rows * tokens // sequence * head_dim * element
    return local * (2 * heads + 2 * max(kv_heads, sequence)) * (sequence - 1) // sequence


def exchanged_bytes(config: PretrainedConfig, tokens: int, element: int, sequence: int, recomputed: float) -> int:
    """Bytes that a process sends for one document of so many tokens: all layers, forward and backward.

    `element` is the bytes of a number, `recomputed` the share of layers whose forward pass runs twice.
    """
    text = config.get_text_config()
    heads, (dim, _) = text.num_attention_heads, head_dims(text)
    sizes = {"heads": heads, "kv_heads": key_heads(text), "head_dim": dim, "element": element}
    layer = bytes_sent(tokens=-(-tokens // sequence) * sequence, sequence=sequence, **sizes)
    return round(layer * text.num_hidden_layers * (2 + recomputed))


def _facts(config: PretrainedConfig, core: str) -> Any:
    """What the registration reads of a model, where some architectures leave fields out or at None."""
    text = config.get_text_config()
    facts = SimpleNamespace(
        _attn_implementation=core,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=key_heads(text),
        head_dim=head_dims(text)[0],
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
    )
    facts.get_text_config = lambda: facts
    return SimpleNamespace(config=facts)


def _where_shared(exchange: Callable[..., Any], alone: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`exchange` where this process holds a slice of the tokens that the layouts describe, `alone` where all."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        if kwargs["layouts"][0].length == query.shape[2]:
            return alone(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("position_ids") is None:
            raise UserError(f"{type(module).__name__} does not hand position_ids to its attention: use another model")
        if kwargs.get("s_aux") is not None:  # 8 heads over 2 processes: the second attends with heads 4 to 7
            kwargs["s_aux"] = kwargs["s_aux"].chunk(mesh.sequence)[mesh.sequence_rank]
        dim, value_dim = query.shape[-1], value.shape[-1]
        query, key, value = query.to(value.dtype), key.to(value.dtype), widened(value, dim)
        out, weights = exchange(module, query, key, value, attention_mask, **kwargs)
        # (B, T/SP, Hq * D), of which the values' share is the model's
        return out if dim == value_dim else out.unflatten(-1, (-1, dim))[..., :value_dim].flatten(-2), weights

    attention.exchanges = True  # type: ignore[attr-defined]
    return attention
