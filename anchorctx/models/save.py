"""A model as a Hugging Face folder that others read too: transformers 4 and what builds on it (vLLM, SGLang, ...).

transformers 5 writes some settings under names that version 4 does not know, which then takes its defaults in silence
(theta 1e4, no scaling) or stops. Both names are written here; transformers 5 reads its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from anchorctx.models.generation import drop_unused
from anchorctx.models.rope import full_parameters, reach
from anchorctx.records.files import follow_umask, write_bytes
from anchorctx.records.manifest import read_json

logger = logging.getLogger(__name__)

SLIDING = "sliding_attention"
THETA = {"gpt_neox": "rotary_emb_base", "modernbert-decoder": "global_rope_theta"}
"""What transformers 4 calls theta, where not `rope_theta`."""
PARTIAL = {"gpt_neox": "rotary_pct"}
"""What it calls the rotated share of a head, where not `partial_rotary_factor`."""
LOCAL_THETA = {
    "gemma3_text": "rope_local_base_freq",
    "gemma3n_text": "rope_local_base_freq",
    "modernbert-decoder": "local_rope_theta",
}
"""What it calls theta of the sliding-window layers, where it knows two of them; elsewhere one is for all layers."""
OUTSIDE = ("rope_theta", "partial_rotary_factor")
"""RoPE settings that transformers 4 keeps beside `rope_scaling`."""
TOKENIZER_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Names that only transformers 5 knows, and those that both do."""


def save_model(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> None:
    """Write weights, configuration and tokenizer as a folder that plain `AutoModelForCausalLM.from_pretrained` loads.

    transformers does not write the attention implementation, so the folder needs no `anchorctx`. The tokenizer's
    `model_max_length` becomes what the RoPE settings reach, where it was less. Files get the rights that the umask
    leaves (safetensors writes them for their owner alone).
    """
    drop_unused(model.generation_config)
    model.save_pretrained(folder)
    _rewrite(folder / "config.json", lambda fields: fields | older_names(model.config, fields))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        longest = reach(model.config.get_text_config())
        _rewrite(folder / "tokenizer_config.json", lambda fields: _older_tokenizer(fields, longest))
    follow_umask(folder)


def older_names(config: PretrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 needs beside `fields`, those that transformers 5 wrote to config.json."""
    more: dict[str, Any] = {"torch_dtype": fields["dtype"]} if fields.get("dtype") else {}
    text = config.get_text_config()
    if text is config:
        return more | _older_rope(config)
    # a multimodal model keeps its text model's settings in a dictionary of their own
    name = next(name for name in config.sub_configs if getattr(config, name, None) is text)
    return more | {name: fields[name] | _older_rope(text)}


def _older_rope(config: PretrainedConfig) -> dict[str, Any]:
    if not getattr(config, "rope_parameters", None):
        return {}
    kind, full = config.model_type, full_parameters(config)
    fields = {THETA.get(kind, "rope_theta"): full["rope_theta"], "rope_scaling": _older_scaling(kind, full)}
    if full.get("partial_rotary_factor") is not None:
        fields[PARTIAL.get(kind, "partial_rotary_factor")] = full["partial_rotary_factor"]
    sliding = config.rope_parameters.get(SLIDING)
    if kind in LOCAL_THETA and sliding:
        fields[LOCAL_THETA[kind]] = sliding["rope_theta"]
    if untold := _untold(config, full, sliding):
        logger.warning("transformers 4 would read this model wrongly, for it does not know %s: use version 5", untold)
    return fields


def _older_scaling(kind: str, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling`: None where nothing is scaled, which transformers 4 does not take for a dictionary."""
    scaling = {name: value for name, value in parameters.items() if name not in OUTSIDE}
    if scaling.get("rope_type", "default") == "default":
        return None
    if kind == "phi3":  # takes these three and no other
        return {"type": scaling["rope_type"]} | {n: scaling[n] for n in ("short_factor", "long_factor")}
    return scaling


def _untold(config: PretrainedConfig, full: dict[str, Any], sliding: dict[str, Any] | None) -> str | None:
    """The first of the model's RoPE settings that no name of transformers 4 can say."""
    if sliding and sliding.get("rope_type", "default") != "default":
        return "a scaling of the sliding-window layers"
    if sliding and config.model_type not in LOCAL_THETA and sliding["rope_theta"] != full["rope_theta"]:
        return "another theta of the sliding-window layers"
    # it takes max_position_embeddings / original for the factor: the same as long as neither was set apart
    original = full.get("original_max_position_embeddings")
    if full.get("rope_type") == "yarn" and config.max_position_embeddings != original * full["factor"]:
        return f"YaRN's factor, {full['factor']:g}, apart from the maximum length, {config.max_position_embeddings}"
    return None


def _older_tokenizer(fields: dict[str, Any], longest: int) -> dict[str, Any]:
    """tokenizer_config.json for a model that reaches `longest` tokens."""
    fields["tokenizer_class"] = TOKENIZER_CLASS.get(fields["tokenizer_class"], fields["tokenizer_class"])
    fields["model_max_length"] = max(fields.get("model_max_length") or 0, longest)
    # transformers 4 has a dictionary under the first name, and the list under the second
    if isinstance(extra := fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = extra
        del fields["extra_special_tokens"]
    return fields


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    fields = change(read_json(path))
    write_bytes(path, (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode())
