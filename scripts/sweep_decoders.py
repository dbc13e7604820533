"""Run every causal decoder of transformers on packed documents, and write down which keep them apart.

    python scripts/sweep_decoders.py              # two minutes; writes anchorctx/attention/known_decoders.json
    python scripts/sweep_decoders.py llama mamba  # prints these, writes nothing

Each is a tiny random model in float64: two documents in a row through the layout's attention against each of them alone
through the model's own eager attention, logits and gradients. `docs/draw_models.py` makes docs/models.md of the file.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from unittest import mock

import torch
import transformers
from transformers import PretrainedConfig

from anchorctx.attention import architecture, interface
from anchorctx.testing import decoders
from anchorctx.testing.tiny import true_float64

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}
"""Largest difference that is rounding. Measured: 2e-14 and 1e-5 at most for what is called exact, 0.2 and more else."""
STATE = re.compile(r"conv|ssm|state_size|mamba|linear_(key|num|head|attn)|lru|cca_|^attention_hidden_size|chunkwise")
"""Fields of models that carry a state over the row."""
UNTRIED = "untried"
"""Needs a package that is not installed: in neither list, so that it is tried where it is loaded."""


def main(names: list[str]) -> None:
    """Sweep, and write the file where all were run."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    interface.register()
    exact: set[str] = set()
    refused: dict[str, set[str]] = {}
    for name in names or decoders.TYPES:
        reason, told = judge(name)
        print(f"{name:28} {reason or 'exact':14} {told}", flush=True)
        if reason == UNTRIED:
            continue
        (refused.setdefault(reason, set()) if reason else exact).update(types_of(name))
    if not names:
        for reason in refused:  # a text model that one wrapper spoils and another one does not
            refused[reason] -= exact
        data = {
            "transformers": transformers.__version__,
            "exact": sorted(exact),
            "refused": {reason: sorted(refused[reason]) for reason in sorted(refused)},
        }
        architecture.DATA.write_text(json.dumps(data, indent=2) + "\n")


def types_of(name: str) -> set[str]:
    """The model type and that of its text model."""
    if name.startswith("musicgen"):
        return {name}
    return {name, decoders.default(name).get_text_config().model_type}


def judge(name: str) -> tuple[str | None, str]:
    """(why the decoder is refused or None, what was measured)."""
    try:
        config = decoders.tiny(name)
    except Exception as error:
        return why(None), said(error)
    told = "not run"
    for dtype, tolerance in TOLERANCE.items():
        try:
            logits, gradients, model_type = measure(config, dtype)
        except Exception as error:
            told = said(error)
            continue
        told = f"{logits:.1e} {gradients:.1e} {dtype}"
        if max(logits, gradients) < tolerance:
            text = architecture.text_config(config)
            rotates = text is not None and architecture.has_rope(text) and not config.is_encoder_decoder
            alone = model_type in decoders.TYPES
            return (None if alone else "part") if rotates else why(config), told
    return why(config, told), told


def said(error: Exception) -> str:
    """The error on a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def unjudged() -> mock._patch:
    """Inside, no architecture is refused."""
    nothing = {"refusal": lambda config: None, "listed": lambda config: None, "is_known": lambda config: True}
    return mock.patch.multiple(architecture, **nothing)


def measure(config: PretrainedConfig, dtype: torch.dtype) -> tuple[float, float, str]:
    """Largest differences of logits and of gradients, and the model's own type (a wrapper's may be its text model)."""
    row = decoders.row()
    with true_float64(), unjudged():
        plain, model = (decoders.build(config, name) for name in ("eager", "anchor"))
        for each in (plain, model):
            torch.nn.Module.to(each, dtype)
        expected = decoders.logits_alone(plain, row)
        found = model(input_ids=row.ids, position_ids=row.positions, layouts=(row.layout,), use_cache=False).logits
        cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        for logits in (found, expected):
            (logits * cotangent).sum().backward()
    return decoders.difference(found, expected), decoders.gradient_difference(model, plain), model.config.model_type


def why(config: PretrainedConfig | None, told: str = "") -> str:
    """The name in `architecture.REASONS` of what keeps documents from being apart."""
    text = None if config is None else architecture.text_config(config)
    if config is None or text is None or config.is_encoder_decoder:
        return "encoder"
    fields = vars(text)
    if "encoder_config" in fields:
        return "encoder"
    if "ImportError" in told:
        return UNTRIED
    if "assistant" in config.model_type:
        return "assistant"
    if any(STATE.search(name) for name in fields) or {"hybrid"} & set(fields.get("layer_types") or ()):
        return "state"
    if any("index_" in name for name in fields):
        return "index"
    if not architecture.has_rope(text) and not any("rotary" in name for name in fields):
        return "no_rope"
    return "bias" if "attention mask beside" in told else "own_attention"


if __name__ == "__main__":
    main(sys.argv[1:])
