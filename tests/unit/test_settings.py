"""Ranges of settings: each command refuses a number out of its range in one sentence, with key, value and limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Lt

from anchorctx.cli.main import main
from anchorctx.config import SCHEMAS
from anchorctx.data.sources.facts import NUM_KEYS
from anchorctx.errors import UserError
from anchorctx.evals.evaluators.config import RetrievalConfig
from anchorctx.settings import Positive, PositiveFloat, Share, check_ranges

NEEDED = {
    "prepare": ["out_dir=x", "tokenizer=y", "row_length=64", "sources=[{path: z}]"],
    "train": ["out_dir=x", "data.train=y"],
    "export": ["run=x", "out_dir=y"],
    "eval": ["out_dir=x"],
    "kvcomm": ["out_dir=x"],
    "precision": ["model=x", "out_dir=y"],
    "plot": ["out_dir=x"],
}
OUT_OF_RANGE = {
    "prepare": {
        "anchor_len=0": "anchor_len=0 must be at least 1: patterns without an anchor ignore it",
        "workers=0": "workers=0 must be at least 1: use null to choose by the processors",
        "seed=-1": "seed=-1 must be at least 0; the default is 0",
        "row_length=3000000000": "row_length=3000000000 must be at most 2147483647",
        "mixture.tokens=9223372036854775808": "mixture.tokens=9223372036854775808 must be at most 1e+15",
        "pack.interleave=0": "pack.interleave=0 must be at least 1: use 1 for whole documents, or 2 or 3",
        "pack.buffer_tokens=-5": "pack.buffer_tokens=-5 must be at least 1: leave it at its default",
        "mixture.weights={web: nan}": "mixture.weights.web=nan must be above 0: remove the source to leave it out",
        "mixture.weights={web: inf}": "mixture.weights.web=inf must be a finite number: remove the source",
        "mixture.long_share={web: 1.5}": "mixture.long_share.web=1.5 must be between 0 and 1",
        "mixture.max_repeats=inf": "mixture.max_repeats=inf must be a finite number: 1 repeats nothing",
        "mixture.long_from=1": "mixture.long_from=1 must be at least 2: raise it, or use null",
        "sources=[{path: z},{stdlib: {sigma: nan}}]": "sources[1].stdlib.sigma=nan must be between 0 and 10",
    },
    "plan": {
        "gpus=0": "gpus=0 must be at least 1; the default is 8",
        "row_length=-1": "row_length=-1 must be at least 1; the default is null",
        "gpu_memory_gib=0": "gpu_memory_gib=0.0 must be above 0; the default is null",
        "gpu_memory_gib=inf": "gpu_memory_gib=inf must be a finite number; the default is null",
        "assume.link=0": "assume.link=0.0 must be above 0 and at most 1; the default is 0.7",
        "assume.fragmentation=1": "assume.fragmentation=1.0 must be at least 0 and below 1; the default is 0.05",
        "corpus.median=nan": "corpus.median=nan must be above 0; the default is 800.0",
        "corpus.rows=0": "corpus.rows=0 must be at least 1; the default is 64",
    },
    "train": {
        "steps=0": "steps=0 must be at least 1; the default is 2000",
        "micro_tokens=-1": "micro_tokens=-1 must be at least 1: null takes a row and a sixteenth",
        "validate_every=-1": "validate_every=-1 must be at least 0; the default is 100",
        "model.max_length=0": "model.max_length=0 must be at least 1: leave it out to keep the checkpoint's",
        "model.rope.theta=nan": "model.rope.theta=nan must be at least 1: leave it out to keep the checkpoint's",
        "optim.lr=0": "optim.lr=0.0 must be above 0; the default is 2e-05",
        "optim.lr=inf": "optim.lr=inf must be a finite number; the default is 2e-05",
        "optim.betas=[0.9,1]": "optim.betas[1]=1.0 must be at least 0 and below 1; the default is [0.9, 0.95]",
        "optim.warmup_steps=-1": "optim.warmup_steps=-1 must be at least 0; the default is 0",
        "parallel.sequence_parallel=0": "parallel.sequence_parallel=0 must be at least 1: 1 is none",
        "parallel.timeout_s=inf": "parallel.timeout_s=inf must be a finite number; the default is 1800.0",
        "memory.loss_tile=0": "memory.loss_tile=0 must be at least 1: null chooses it",
        "checkpoint.keep_last=0": "checkpoint.keep_last=0 must be at least 1; the default is 2",
        "logging.every=0": "logging.every=0 must be at least 1; the default is 1",
        "live.every=-1": "live.every=-1 must be at least 0; the default is 0",
        "live.perplexity.documents=-1": "live.perplexity.documents=-1 must be at least 0; the default is 16",
    },
    "export": {"step=-1": "step=-1 must be at least 0; the default is null"},
    "eval": {
        "seed=-1": "seed=-1 must be at least 0; the default is 0",
        "models=[{path: a},{path: b, max_length: 0}]": "models[1].max_length=0 must be at least 1",
        "models=[{path: a, rope: {factor: nan}}]": "models[0].rope.factor=nan must be at least 1: leave it out",
        "perplexity.max_length=2": "perplexity.max_length=2 must be at least 3; the default is 4096",
        "needle.depths=[0,nan]": "needle.depths[1]=nan must be between 0 and 1; the default is [0.0, 0.25, 0.5,",
        "retrieval.facts=65": "retrieval.facts=65 must be between 1 and 64; the default is 8",
        "retrieval.mentions=1": "retrieval.mentions=1 must be at least 2: a fact is stated once, then asked for",
        "ruler.limit=0": "ruler.limit=0 must be at least 1; the default is null",
        "lm_eval.num_fewshot=-1": "lm_eval.num_fewshot=-1 must be at least 0; the default is null",
        "precision.shift=0": "precision.shift=0 must be at least 1: leave 0 out",
        "kvcomm.settings.temperature=inf": "kvcomm.settings.temperature=inf must be a finite number",
    },
    "precision": {
        "shifts=[16,0]": "shifts[1]=0 must be at least 1: leave 0 out",
        "texts=0": "texts=0 must be at least 1; the default is null",
        "layers=[-1]": "layers[0]=-1 must be at least 0; the default is []",
    },
    "kvcomm": {
        "settings.warmup=0": "settings.warmup=0 must be at least 1; the default is 3",
        "settings.max_bytes=0": "settings.max_bytes=0 must be at least 1: null is no limit",
        "variation.prefix=0": "variation.prefix=0 must be at least 1; the default is 256",
        "copy.output=-1": "copy.output=-1 must be at least 1; the default is 64",
        "gsm8k.problems=-1": "gsm8k.problems=-1 must be at least 0: 0 takes all",
        "humaneval.max_new_tokens=0": "humaneval.max_new_tokens=0 must be at least 1; the default is 384",
        "retrieval.confidence=nan": "retrieval.confidence=nan must be between 0 and 1; the default is 0.8",
        "gate.max_kl=-0.1": "gate.max_kl=-0.1 must be at least 0; the default is 0.05",
        "sandbox.wall_seconds=inf": "sandbox.wall_seconds=inf must be a finite number; the default is 10.0",
    },
    "plot": {"row=-1": "row=-1 must be at least 0; the default is null"},
    "report": {"pretraining_length=0": "pretraining_length=0 must be at least 1; the default is null"},
}


def test_every_command_is_tried() -> None:
    assert OUT_OF_RANGE.keys() == SCHEMAS.keys()


@pytest.mark.parametrize(
    ("command", "override", "sentence"),
    [(command, override, sentence) for command, cases in OUT_OF_RANGE.items() for override, sentence in cases.items()],
)
def test_a_number_out_of_range_is_one_sentence_and_exit_code_2(
    command: str, override: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for word in NEEDED.get(command, []) if word.split("=")[0] != override.split("=")[0]]
    assert main([command, *given, override]) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1
    assert captured.err.startswith(f"anchorctx {command}: {sentence}")


@dataclass(kw_only=True, slots=True)
class Part:
    share: Share = 0.5
    rates: list[PositiveFloat] = field(default_factory=lambda: [1.0])
    by_name: dict[str, Annotated[int, Ge(1), Lt(9)]] | None = None


@dataclass(kw_only=True, slots=True)
class Whole:
    folder: str
    steps: Positive
    size: Annotated[int, Ge(1), "null is none"] | None = None
    part: Part = field(default_factory=lambda: Part(share=0.25))
    parts: list[Part] | None = None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"size": 0}, "size=0 must be at least 1: null is none"),
        ({"part": Part(share=2)}, "part.share=2 must be between 0 and 1; the default is 0.25"),
        ({"part": Part(rates=[1, -1])}, "part.rates[1]=-1 must be above 0; the default is [1.0]"),
        ({"parts": [Part(), Part(by_name={"a": 9})]}, "parts[1].by_name.a=9 must be at least 1 and below 9"),
        ({"part": Part(rates=[float("inf")])}, "part.rates[0]=inf must be a finite number; the default is [1.0]"),
    ],
)
def test_configurations_made_in_python_are_checked_as_well(change: dict[str, Any], sentence: str) -> None:
    config = Whole(**{"folder": "x", "steps": 1} | change)
    with pytest.raises(UserError) as error:
        check_ranges(config)
    assert str(error.value) == sentence
    with pytest.raises(UserError) as error:
        check_ranges(config, "section")
    assert str(error.value) == f"section.{sentence}"


def test_types_are_left_alone() -> None:
    config = Whole(folder=Path("x"), steps=3, parts=[Part(share=1)])  # type: ignore[arg-type]
    check_ranges(config)
    assert config.folder == Path("x") and config.parts == [Part(share=1)]


def test_as_many_facts_as_there_are_keys_for() -> None:
    check_ranges(RetrievalConfig(facts=NUM_KEYS))
    with pytest.raises(UserError):
        check_ranges(RetrievalConfig(facts=NUM_KEYS + 1))
