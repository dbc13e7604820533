"""The model card of an export, README.md on the hub: what the run's own records say, and nothing that they do not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from anchorctx.layout import Pattern
from anchorctx.models.rope import full_parameters, reach
from anchorctx.records.manifest import FILE
from anchorctx.records.typed import read_fields
from anchorctx.train.callbacks import METRICS
from anchorctx.train.checkpoints.folders import State

ATTENTION = {
    Pattern.anchor: "AnchorAttention: a document sees itself and the row's first token, the anchor",
    Pattern.anchor_reset: "AnchorAttention, with each document's positions counted from the anchor on",
    Pattern.full: "causal over the whole row",
    Pattern.intra_doc: "causal inside each document",
    Pattern.intra_doc_reset: "causal inside each document, with its positions counted from 0 on",
}
ANCHORED = """\
Let a prompt begin with the tokenizer's BOS token (EOS where it has none): in training it stood in front of every
document, as the anchor.

"""
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags: [long-context, anchorctx]
---

# {name}

{base}, trained by anchorctx{version} on rows of {row_length:,} tokens. It reads up to {reach:,} tokens.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
```

{anchored}## Training

{training}

## Data

{data}

{figures}## Citation

```bibtex
@article{{wang2024precision,
  title = {{When Precision Meets Position: BFloat16 Breaks Down RoPE in Long-Context Training}},
  author = {{Wang, Haonan and others}},
  journal = {{arXiv preprint arXiv:2411.13476}},
  year = {{2024}}
}}
```
"""


@dataclass
class _Model:
    path: str | None
    config: dict[str, Any] | None
    dtype: str
    rope_dtype: str


@dataclass
class _Optim:
    betas: list[float]
    weight_decay: float
    clip: float
    lr: float
    schedule: str
    warmup_steps: int


@dataclass
class _Config:
    pattern: Pattern
    steps: int
    tokens_per_step: int
    seed: int
    model: _Model
    optim: _Optim


@dataclass
class _Packed:
    fingerprint: str
    rows: int
    row_length: int


@dataclass
class _Run:
    """What a card needs of a run's manifest."""

    config: _Config
    data: _Packed
    versions: dict[str, str | None]


def model_card(run: Path, state: State, model: PreTrainedModel, name: str) -> str:
    """The card of the model that `folder`, a checkpoint of `run`, became; Markdown with the hub's header.

    Args:
        run: `out_dir` of the training run.
        state: of one of its checkpoints.
        model: with the configuration that is exported.
        name: what to call it.
    """
    manifest = read_fields(run / FILE, _Run, "restore it: the model's card tells what it says")
    config, packed = manifest["config"], manifest["data"]
    on_hub, base = _base(config["model"])
    pattern = Pattern(config["pattern"])
    return CARD.format(
        name=name,
        base=base,
        base_model=f"base_model: {on_hub}\n" if on_hub else "",
        version=f" {version}" if (version := manifest["versions"]["anchorctx"]) else "",  # None: not installed
        row_length=packed["row_length"],
        reach=reach(model.config.get_text_config()),
        anchored=ANCHORED if pattern in (Pattern.anchor, Pattern.anchor_reset) else "",
        training=_table(_training(config, state, model, manifest), "setting", "value"),
        data=_table(_data(packed), "tokens", "number"),
        figures=_figures(run / METRICS, state.step),
    )


def _base(model: dict[str, Any]) -> tuple[str | None, str]:
    """The base model's name on the hub, if it came from there, and what to call it."""
    path = model["path"]
    if path is None:
        return None, f"A new {model['config']['model_type']} model"
    # a folder's place says nothing to others, and more than they need to know
    if Path(path).expanduser().exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        return None, f"The checkpoint `{Path(path).name}`"
    return path, f"[{path}](https://huggingface.co/{path})"


def _training(
    config: dict[str, Any], state: State, model: PreTrainedModel, manifest: dict[str, Any]
) -> Iterable[tuple[str, object]]:
    text, optim = model.config.get_text_config(), config["optim"]
    rope = full_parameters(text)
    kind = rope.get("rope_type", "default")
    yield "attention", ATTENTION[Pattern(config["pattern"])]
    yield "RoPE", f"theta {rope['rope_theta']:g}" + ("" if kind == "default" else f", {kind} by {rope.get('factor')}")
    yield "rotation in", config["model"]["rope_dtype"]
    yield "weights and activations in", config["model"]["dtype"]
    yield "steps", f"{state.step:,} of {config['steps']:,}, of {config['tokens_per_step']:,} tokens"
    yield "trained tokens", f"{state.tokens:,}"
    yield (
        "optimizer",
        f"AdamW, betas {optim['betas']}, weight decay {optim['weight_decay']}, clip {optim['clip']}",
    )
    yield "learning rate", f"{optim['lr']}, {optim['schedule']}, {optim['warmup_steps']} steps of warm-up"
    yield "seed", config["seed"]
    yield "processes", state.processes
    yield "software", ", ".join(f"{k} {v}" for k, v in manifest["versions"].items() if k in ("torch", "transformers"))


def _data(packed: dict[str, Any]) -> Iterable[tuple[str, object]]:
    yield "packed set", packed["fingerprint"]
    yield "rows", f"{packed['rows']:,} of {packed['row_length']:,}"
    account = packed.get("accounting")
    if account is None:  # of a set that was not made by `prepare`
        return
    yield "documents", f"{packed['documents']:,}"
    yield "in the documents", f"{account['document_tokens']:,}"
    yield "trained in one pass", f"{account['trained']:,}"
    for reason, tokens in sorted(account["dropped"].items()):
        yield f"dropped: {reason}", f"{tokens:,}"
    yield "padding", f"{account['padding']:,}"
    for source, counts in account["sources"].items():
        yield f"trained of `{source}`", f"{counts['trained']:,}"


def _figures(metrics: Path, step: int) -> str:
    """The losses at the checkpoint and before training, as a section; nothing for a run without them."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    rows = [row for row in rows if row["step"] <= step]
    found = []
    for name in ("train/loss", "val/loss", "val/perplexity"):
        values = [(row["step"], row[name]) for row in rows if name in row]
        if values:
            (first, before), (last, after) = values[0], values[-1]
            found.append((f"{name}, step {first} and {last}", f"{before:.4f}, {after:.4f}"))
    return f"## Figures\n\n{_table(found, 'measured in training', 'value')}\n\n" if found else ""


def _table(rows: Iterable[tuple[str, object]], *heads: str) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
