"""Judges a model of transformers while it is built, so that `from_pretrained(..., attn_implementation="anchor")` does.

Most models that would mix documents ask for a mask in their forward pass, and are refused there. Some never ask for
anything: a state-space model takes `layouts=` among its keyword arguments and goes on. torch calls a hook for every
part that a module is given, and of those this looks at the parts of a model with our attention; nothing is added to a
forward pass.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.nn import Module
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from anchorctx.attention import architecture
from anchorctx.attention.keywords import hand_on_keywords


@functools.cache  # once a process
def judge_new_models() -> None:
    """From now on a model that is built with our attention and would mix documents raises UserError."""
    register_module_module_registration_hook(_judge)


def _judge(module: Module, name: str, part: Any) -> None:
    if not isinstance(module, PreTrainedModel) or not str(module.config._attn_implementation).startswith("anchor"):
        return
    if type(module).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        reason = architecture.refusal(module.config)
    else:  # a model without a head, or a part of another: an exact one may have Whisper's encoder for sound
        reason = architecture.listed(module.config)
        reason = None if reason == "encoder" else architecture.REASONS.get(reason or "")
    if reason is not None:
        raise architecture.refused(module.config, reason)
    if isinstance(part, PreTrainedModel):
        hand_on_keywords(part)
