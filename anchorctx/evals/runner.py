"""`evaluate`: load a Hugging Face folder fresh, run evaluations on it, and write `results.jsonl`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from anchorctx.data.documents import Reading
from anchorctx.data.sources import SourceConfig, SourceFormat, open_source
from anchorctx.data.stdlib import Split, StdlibConfig
from anchorctx.errors import UserError
from anchorctx.evals.base import Evaluator
from anchorctx.evals.perplexity import Perplexity, PerplexityConfig
from anchorctx.evals.retrieval import Retrieval, RetrievalConfig
from anchorctx.manifest import build_manifest, write_manifest
from anchorctx.results import FILE, Result, append_results


class EvalName(StrEnum):
    """The evaluations."""

    perplexity = "perplexity"
    """Perplexity of held-out documents, each alone behind the anchor."""
    retrieval = "retrieval"
    """Retrieval accuracy of planted facts against context length."""


class EvalDtype(StrEnum):
    """Precision of the weights and activations."""

    auto = "auto"
    """As saved on a GPU; float32 on a CPU."""
    float32 = "float32"
    """Full precision."""
    bfloat16 = "bfloat16"
    """Half the memory."""


def _embedded() -> SourceConfig:
    return SourceConfig(format=SourceFormat.stdlib, stdlib=StdlibConfig(split=Split.validation))


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What `anchorctx eval` does."""

    model: str
    """Hugging Face folder (or hub name) with weights and tokenizer."""
    out_dir: str
    """Folder for results.jsonl (appended to) and manifest.json."""
    evals: list[EvalName] = field(default_factory=lambda: [EvalName.perplexity])
    """Evaluations to run: perplexity, retrieval."""
    label: str | None = None
    """Name of the model in the results; null takes the folder's name."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration to change, such as {max_position_embeddings: 4096} to read past its limit."""
    corpus: SourceConfig = field(default_factory=_embedded)
    """Held-out documents: any source that `prepare` takes; the embedded corpus' validation files by default."""
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    """Settings of the perplexity evaluation."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Settings of the retrieval evaluation."""
    seed: int = 0
    """Seed of whatever an evaluation draws."""
    dtype: EvalDtype = EvalDtype.auto
    """Precision: auto, float32 or bfloat16."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where there is one."""


def evaluate(config: EvalConfig) -> list[Result]:
    """Run the evaluations in order; returns all rows, each appended to `out_dir`/results.jsonl once it is known."""
    reading = Reading(on_bad_row=config.corpus.on_bad_row)
    texts = [document.text for document in open_source(config.corpus).texts(reading)]
    evaluators = [EVALUATORS[name](config, texts) for name in config.evals]
    disable_progress_bar()  # ours are enough
    model, tokenizer = load_folder(config)
    for evaluator in evaluators:
        check_reach(model, config.model, evaluator)
    manifest = build_manifest("eval", dataclasses.asdict(config))
    stamp = {"manifest": write_manifest(Path(config.out_dir), manifest)}
    label = {"model": config.label or Path(config.model).name}
    results = []
    for evaluator in evaluators:
        with tqdm(unit="tok", unit_scale=True, desc=f"{evaluator.name} of {label['model']}") as bar:

            def advance(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done)

            for row in evaluator.run(model, tokenizer, advance):
                row = dataclasses.replace(row, **stamp, context=label | row.context)
                append_results(Path(config.out_dir) / FILE, [row])
                results.append(row)
    return results


def load_folder(config: EvalConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer as any user of transformers would; UserError when the folder is no model."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype.value
    if config.dtype is EvalDtype.auto and device == "cpu":
        dtype = "float32"
    folder = Path(config.model)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(
            f"model={config.model} has no config.json, so it is no Hugging Face model: name an exported folder "
            "(a DeepSpeed checkpoint becomes one with anchorctx export)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        hf_config = AutoConfig.from_pretrained(config.model, **config.config)
        model = AutoModelForCausalLM.from_pretrained(config.model, config=hf_config, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model={config.model} cannot be loaded ({reason}): name a folder with a model and tokenizer"
        ) from error
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), tokenizer


def check_reach(model: PreTrainedModel, name: str, evaluator: Evaluator) -> None:
    """Raise UserError when an evaluation gives the model more tokens than its positions reach."""
    reach = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if reach is not None and evaluator.longest() > reach:
        raise UserError(
            f"{evaluator.name} asks for {evaluator.longest()} tokens, but {name} has max_position_embeddings={reach}: "
            "lower the length, or read past it with config='{max_position_embeddings: ...}'"
        )


EVALUATORS: dict[EvalName, Callable[[EvalConfig, Sequence[str]], Evaluator]] = {
    EvalName.perplexity: lambda config, texts: Perplexity(config.perplexity, texts),
    EvalName.retrieval: lambda config, texts: Retrieval(config.retrieval, texts, config.seed),
}
"""How each evaluation is made from the configuration and the held-out texts."""
