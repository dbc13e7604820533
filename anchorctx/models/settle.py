"""What a configuration says in ways that stop or mislead transformers, said so that it computes what is meant."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


def settle(config: PretrainedConfig) -> None:
    """Change a configuration in place; what it means stays.

    - The attention kernel of the machine that wrote it is forgotten: each command names its own, and one that names
      none would be refused where that kernel is not installed.
    - A padding token below 0 is none, as in Meta's own files. torch counts it from the end, and never trains the
      embedding of the last token.
    - A head dimension of null is the hidden size over the heads. The scalings of RoPE read it, and stop at null.
    """
    config._attn_implementation = None
    text: Any = config.get_text_config()
    fields = vars(text)  # of models whose layers differ, attributes raise
    if isinstance(fields.get("pad_token_id"), int) and text.pad_token_id < 0:
        text.pad_token_id = None
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    known = isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0
    if known and fields.get("head_dim", 0) is None:
        text.head_dim = hidden // heads
