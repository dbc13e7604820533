"""Writes docs/models.md, the table of decoders, from anchorctx/attention/known_decoders.json.

python docs/write_models.py
"""

from __future__ import annotations

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from anchorctx.attention.architecture import REASONS, known

PAGE = Path(__file__).with_name("models.md")
NOTES = {
    "gemma2": "soft-capped scores: `flash_attn`, `flex` and `reference`",
    "gemma4": "head dimensions by layer",
    "gptj": "a table of angles: `model.rope` is refused",
    "codegen": "a table of angles: `model.rope` is refused",
    "beam": "layers that see the whole row do not rotate: `model.rope` is refused",
    "llama4": "documents of at most 8,191 tokens with their anchor: the chunk, and the scale of its queries",
    "llama4_text": "as `llama4`",
    "gpt_oss": "attention sinks, trained too",
    "flint": "attention sinks, trained too",
    "granite_swa": "attention sinks, trained too; a theta for each layer",
    "granitemoe_swa": "attention sinks, trained too; a theta for each layer",
    "deepseek_v2": "latent attention: values of another head dimension",
    "deepseek_v3": "latent attention: values of another head dimension",
    "nemotron": "its layers drop the forward's keywords: hooks hand them on",
    "stablelm": "its layers drop the forward's keywords: hooks hand them on",
    "lfm2": "without convolutions, as its default configuration is; checkpoints have them and are refused",
    "minimax_m3_vl_text": "without sparse layers, as its default configuration is; others are refused",
    "diffllama": "parts in float32: to 4e-6",
    "phi4_multimodal": "text",
}
"""What else is to be said of an exact decoder, by its model type."""


def page() -> str:
    """The page's text."""
    exact, refused, version = known()
    types = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in exact]
    rows = [f"| `{name}` | {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]} | {NOTES.get(name, '')} |" for name in types]
    return TEXT.format(
        total=len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        version=version,
        exact=len(types),
        rows="\n".join(rows),
        refused="\n".join(f"| {REASONS[r]} | {names(r, refused)} |" for r in sorted(set(refused.values()))),
    )


def names(reason: str, refused: dict[str, str]) -> str:
    """The model types that are refused for this reason."""
    return ", ".join(f"`{name}`" for name in sorted(refused) if refused[name] == reason)


TEXT = """# Which decoders

Of the {total} model types that `AutoModelForCausalLM` loads in transformers {version}, **{exact} are exact**: a row of
packed documents equals every document alone behind its anchor, in logits and gradients, to 1e-12 in float64. The others
are refused in one sentence, whichever way they enter: `anchorctx train`, `plan` and `precision` when they read the
configuration, `check_model`, and plain `from_pretrained(..., attn_implementation="anchor")`.

A model whose attention is set afterwards, by `set_attn_implementation`, is judged in its first forward pass, also if it
was built before `register()`. Only one that came out of a pickle whole after it (`torch.load(..., weights_only=False)`)
and never asks for a mask (`mamba`, `rwkv`, `xlnet`, ...) is not: call `check_model` then.

Each was run as a tiny random model, a layer of every kind, through transformers' own eager attention and through ours
(`scripts/sweep_decoders.py`, two minutes; `tests/numerics/test_every_decoder.py --slow` runs every way in). The outcome
is `anchorctx/attention/known_decoders.json`, of which `docs/write_models.py` makes this page. Settings of an exact type
are looked at too: kinds of layers other than full and sliding attention are refused.

**A decoder that is not in these lists** is tried where it is loaded, in about a second: two documents in a row on a
tiny copy of its configuration against each alone. It is refused with the deviation if they differ, and with the reason
if that cannot be tried.

**Images and sound.** A model that also reads these is trained on text as it is: the rest keeps its weights, is
exported with it, and takes no part.

## Exact

| model type | class | |
|---|---|---|
{rows}

## Refused

| a model that | model types |
|---|---|
{refused}

`gemma3n` needs the package `timm` to be built and was not run; its text model, `gemma3n_text`, is exact.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
