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
    text: Any = config.get_text_config()
    config._attn_implementation = None
    padding = getattr(text, "pad_token_id", None)
    if isinstance(padding, int) and padding < 0:
        text.pad_token_id = None
    hidden, heads = (getattr(text, name, None) for name in ("hidden_size", "num_attention_heads"))
    if getattr(text, "head_dim", 0) is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        if hidden % heads == 0:
            text.head_dim = hidden // heads
