"""A tiny copy of a transformers configuration: a few layers, one of every kind, and narrow.

For trying out an architecture in a second (`attention.trial`). Every kind of layer that the configuration names is
kept, with its window, chunk, experts and RoPE settings; sizes shrink, switches stay.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

VOCABULARY, WINDOW = 96, 5
CHUNK = 16
"""Tokens that a layer with chunks sees: more than a trial's documents have, fewer than its row."""
MOST_LAYERS = 8

_TABLE: dict[int, str] = {
    VOCABULARY: "vocab_size unpadded_vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab",
    64: """hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim input_embedding_size
        output_embedding_size attention_hidden_size lru_width mamba_d_ssm linear_attn_hidden_size hidden_dim""",
    48: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff d_inner dim_ff feed_forward_size
        ffn_hidden_size dense_intermediate_size intermediate_size_mlp shared_intermediate_size expert_ffn_hidden_size
        shared_expert_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size
        shared_expert_ffn_hidden_size""",
    16: """head_dim swa_head_dim moe_intermediate_size q_lora_rank kv_lora_rank router_hidden_size kv_channels
        hidden_size_per_layer_input ple_embed_dim d_head dim_head attention_head_size index_head_dim d_rel o_lora_rank
        linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state ssm_state_size state_size mamba_d_head
        mamba_head_dim mamba_headdim hc_lowrank gated_norm_rank loop_gate_rank adapter_rank time_step_rank rel_extent
        laurel_rank global_head_dim full_attention_head_dim""",
    8: """qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim mamba_dt_rank index_topk log_scaling_n_floor
        mamba_n_heads mamba_num_heads""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        swa_num_attention_heads encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        linear_num_value_heads linear_num_heads index_n_heads num_experts
        num_local_experts n_routed_experts moe_num_experts zero_expert_num chunk_size mamba_chunk_size
        o_groups index_block_size heads_per_ngram""",
    2: """num_key_value_heads swa_num_key_value_heads num_kv_heads num_query_groups linear_num_key_heads
        num_experts_per_tok num_experts_per_token moe_topk moe_k max_window_layers index_topk_blocks n_groups
        mamba_n_groups num_global_key_value_heads""",
    1: """n_group topk_group num_expert_group first_k_dense_replace num_dense_layers moe_layer_start_index
        num_nextn_predict_layers n_input_layers n_recurrent_layers n_output_layers num_layers_per_stack""",
}
_SIZES = {name: size for size, names in _TABLE.items() for name in names.split()} | {
    "attention_chunk_size": CHUNK,
    "floor_scale": 12,
}
"""A field to what it becomes, where it is larger than that."""
_WINDOWS = ("sliding_window", "sliding_window_size", "local_attention", "window_size", "attention_window_size")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks")
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of `config`, nested configurations included, whose model has some ten thousand weights."""
    tiny = copy.deepcopy(config)
    for part in (tiny, *_nested(tiny)):
        _shrink(part)
    return tiny


def _nested(config: PretrainedConfig) -> list[PretrainedConfig]:
    parts = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return parts + [inner for part in parts for inner in _nested(part)]


def _shrink(config: PretrainedConfig) -> None:
    overrides = _take_overrides(config)
    fields = {name: value for name, value in vars(config).items() if not isinstance(value, bool | PretrainedConfig)}
    layers = next((fields[name] for name in _LAYERS if isinstance(fields.get(name), int)), None)
    for name, value in fields.items():
        setattr(config, name, _small(name, value))
    _keep_equal(config, fields)
    if layers:
        kept = _kept_layers(config, layers)
        _keep_layers(config, kept, layers)
        if overrides:
            config.per_layer_config = {
                index: _in_proportion(config, fields, overrides[layer])
                for index, layer in enumerate(kept)
                if layer in overrides
            }
    if isinstance(fields.get("rope_parameters"), dict) and fields.get("num_attention_heads"):
        _fit_rope(config, config.rope_parameters)


def _take_overrides(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """What single layers have in place of the configuration's own values (Gemma 4's head dimensions), taken out."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    overrides = copy.deepcopy(config._heterogeneity_spec.per_layer_overrides)  # type: ignore[attr-defined]
    config.per_layer_config = None  # type: ignore[assignment]
    return overrides


def _in_proportion(config: PretrainedConfig, before: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    # 512 beside a model's head_dim of 256, which became 16: 32
    numbers = {name: value for name, value in override.items() if type(value) is int and before.get(name)}
    return override | {name: max(value * getattr(config, name) // before[name], 1) for name, value in numbers.items()}


def _small(name: str, value: Any) -> Any:
    if name in _TOKENS and value is not None:
        return _TOKENS[name]
    if name in _WINDOWS and isinstance(value, int) and value > 0:
        return WINDOW
    size = _SIZES.get(name)
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value) and size:
        return [min(item, size) for item in value]
    return min(value, size) if isinstance(value, int) and size else value


def _keep_equal(config: PretrainedConfig, before: dict[str, Any]) -> None:
    """Sizes that belong together: as many key heads as query heads, heads that are the sum or the copy of others."""
    heads = before.get("num_attention_heads")
    if heads and heads == before.get("num_key_value_heads"):
        config.num_key_value_heads = config.num_attention_heads
    if "head_dim" in before and before["head_dim"] is None and heads:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if not before.get("qk_rope_head_dim"):
        return
    rope = config.qk_rope_head_dim
    whole = config.qk_nope_head_dim + rope if before.get("qk_nope_head_dim") else rope
    if before.get("qk_head_dim"):
        config.qk_head_dim = whole
    for name in ("head_dim", "v_head_dim"):
        if before.get(name) == before["qk_rope_head_dim"]:
            setattr(config, name, rope)
        elif before.get(name) and before[name] == before.get("qk_head_dim"):
            setattr(config, name, whole)


def _per_layer(config: PretrainedConfig, layers: int) -> dict[str, list[Any]]:
    return {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == layers}


def _kept_layers(config: PretrainedConfig, layers: int) -> list[int]:
    """The first layer of each kind, at least two layers; of those that use another layer's keys, also one each."""
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    kept = _one_of_each_kind(config, layers, range(layers - shared))
    while len(kept) < min(2, layers - shared):
        kept.append(max(kept) + 1)
    if shared:
        again = _one_of_each_kind(config, layers, range(layers - shared, layers))
        config.num_kv_shared_layers = len(again)
        kept += again
    return kept


def _one_of_each_kind(config: PretrainedConfig, layers: int, among: range) -> list[int]:
    # layer_types [linear, linear, full] and mlp_layer_types [dense, sparse, sparse]: layers 0, 1 and 2
    lists = [values for name, values in _per_layer(config, layers).items() if "type" in name or "rope" in name]
    first: dict[str, int] = {}
    for index in among:
        first.setdefault(repr([values[index] for values in lists]), index)
    return sorted(first.values())[:MOST_LAYERS]


def _keep_layers(config: PretrainedConfig, kept: list[int], layers: int) -> None:
    for name, values in _per_layer(config, layers).items():
        setattr(config, name, [values[index] for index in kept])
    for name in _LAYERS:
        if isinstance(vars(config).get(name), int):
            setattr(config, name, len(kept))


def _fit_rope(config: PretrainedConfig, parameters: dict[str, Any]) -> None:
    for value in parameters.values():
        if isinstance(value, dict):  # of one kind of layer
            _fit_rope(config, value)
    dim = vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads
    half = int(dim * (parameters.get("partial_rotary_factor") or 1.0)) // 2
    for name in ("long_factor", "short_factor"):
        if name in parameters:
            parameters[name] = parameters[name][:half]
    if section := parameters.get("mrope_section"):
        # [11, 11, 10] of 32 for half = 8: [3, 3, 2]
        third = -(-half // len(section))
        parameters["mrope_section"] = [third] * (len(section) - 1) + [half - third * (len(section) - 1)]
