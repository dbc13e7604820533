"""Every claim of the miniature, worked out a second time from rows whose values all differ."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator
from math import log
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from anchorctx.records.results import Result

MINIATURE = Path(__file__).parents[3] / "recipes" / "miniature"
LAYERS = {"small": (0, 1), "large": (0, 1, 2, 3)}


def value(*key: Any) -> float:
    """A number from 0.05 to 0.95 that belongs to `key` alone."""
    return 0.05 + 0.9 * (zlib.crc32(repr(key).encode()) / 2**32)


def row(metric: str, model: str, key: tuple[Any, ...], **context: Any) -> Result:
    return Result(metric=metric, value=value(*key), unit="1", n=1, context={"model": model, **context})


def retrieval(model: str, length: int = 4096) -> float:
    return value("retrieval", model, length)


def loss(model: str) -> float:
    return value("loss", model)


def change(model: str, length: int = 4096, arithmetic: str = "bfloat16", first: str = "kept") -> float:
    return value("change", model, length, arithmetic, first)


def attention(model: str) -> float:
    return value("attention", model, 4096)


def keys(model: str) -> float:
    layers = LAYERS["large" if model.startswith("large") else "small"][1:]
    return sum(value("variation", model, "content", "key", layer) for layer in layers) / len(layers)


def kl(model: str, arm: str = "rotate") -> float:
    return value("kl", model, arm, "first", "all")


def difference(model: str, arm: str, kind: str) -> float:
    return value("difference", model, arm, kind)


def two_documents(model: str) -> float:
    return (difference(model, "rotate", "two_hop") + difference(model, "rotate", "override")) / 2


def removed(model: str) -> float:
    return 1 - kl(model, "kvcomm") / kl(model)


def judge(model: str, arm: str, shuffled: bool) -> float:
    return value("judge", model, arm, shuffled)


EFFECTS = {
    "T1": retrieval("anchor") - retrieval("full"),
    "T2": retrieval("anchor") - retrieval("intra_doc"),
    "T3": retrieval("intra_doc") - retrieval("intra_doc_bf16"),
    "T4": retrieval("intra_doc")
    - retrieval("intra_doc_bf16")
    - (retrieval("intra_doc_reset") - retrieval("intra_doc_reset_bf16")),
    "T5": retrieval("intra_doc") - retrieval("intra_doc_bf16") - (retrieval("anchor") - retrieval("anchor_bf16")),
    "T6": retrieval("anchor_bf16") - retrieval("intra_doc_bf16"),
    "T7": retrieval("anchor") - retrieval("anchor_interleaved"),
    "T8": retrieval("anchor_tags") - retrieval("anchor"),
    "T9": loss("full") - loss("anchor"),
    "T10": loss("full") - loss("base"),
    "T11": retrieval("anchor_unique") - retrieval("full_unique"),
    "T12": retrieval("anchor") - retrieval("full") - (retrieval("anchor_unique") - retrieval("full_unique")),
    "L1": retrieval("anchor_16k", 16384) - retrieval("full_16k", 16384),
    "L2": retrieval("anchor_16k", 16384) - retrieval("intra_doc_16k", 16384),
    "L3": retrieval("intra_doc_16k", 16384) - retrieval("intra_doc_16k_bf16", 16384),
    "L4": retrieval("intra_doc_16k", 16384)
    - retrieval("intra_doc_16k_bf16", 16384)
    - (retrieval("intra_doc_reset_16k", 16384) - retrieval("intra_doc_reset_16k_bf16", 16384)),
    "D1": retrieval("large_anchor") - retrieval("large_full"),
    "D2": retrieval("large_anchor") - retrieval("large_intra_doc"),
    "P1": 0.5 - change("intra_doc", first="hidden") / change("intra_doc"),
    "P2": log(change("intra_doc") / change("intra_doc", 512)),
    "P3": 0.5 - change("intra_doc", arithmetic="float32_rotation") / change("intra_doc"),
    "P4": attention("intra_doc") - 0.1,
    "K1": log(keys("full") / keys("anchor")),
    "K2": log(kl("full") / kl("anchor")),
    "K3": two_documents("anchor") - two_documents("full"),
    "K4": removed("full") - removed("anchor"),
    "K5": judge("anchor", "rotate", True) - 0.95,
    "K6": difference("anchor", "anchored", "all") + 0.05,
    "C1": retrieval("anchor_100_steps") - retrieval("full_100_steps"),
    "C2": retrieval("anchor_low_lr") - retrieval("full_low_lr"),
    "C3": retrieval("anchor_theta_1e6") - retrieval("full_theta_1e6"),
    "C4": log(keys("full behind 1,024") / keys("anchor behind 1,024")),
    "C5": log(kl("full behind 1,024") / kl("anchor behind 1,024")),
    "C6": two_documents("anchor behind 1,024") - two_documents("full behind 1,024"),
    "C7": log(keys("large_full") / keys("large_anchor")),
    "C8": log(kl("large_full") / kl("large_anchor")),
    "C9": two_documents("large_anchor") - two_documents("large_full"),
    "C10": attention("large_intra_doc") - 0.1,
    "C11": 0.5 - change("large_intra_doc", first="hidden") / change("large_intra_doc"),
    "B1": retrieval("anchor without BOS") - retrieval("full without BOS"),
    "B2": retrieval("anchor")
    - retrieval("anchor without BOS")
    - (retrieval("intra_doc") - retrieval("intra_doc without BOS")),
    "W1": retrieval("text_anchor") - retrieval("text_full"),
    "W2": attention("text_intra_doc") - 0.1,
    "W3": 0.5 - change("text_intra_doc", first="hidden") / change("text_intra_doc"),
    "W4": attention("large_text_intra_doc") - 0.1,
    "W5": 0.5 - change("large_text_intra_doc", first="hidden") / change("large_text_intra_doc"),
    "R1": retrieval("anchor_again") - retrieval("full_again"),
    "R2": log(keys("full_again") / keys("anchor_again")),
    "R3": log(kl("full_again") / kl("anchor_again")),
    "R4": two_documents("anchor_again") - two_documents("full_again"),
}


def measured(settings: ModuleType) -> Iterator[Result]:
    """One row for everything that the recipe measures and a claim could confuse, of the models that it makes."""
    recipe = yaml.safe_load((MINIATURE / "recipe.yaml").read_text())
    lengths = {name: 4096 for name in recipe["bases"]}
    lengths |= {name: settings.arm_of(recipe, name)["row_length"] for name in recipe["arms"]}
    lengths |= {label: 4096 for label in settings.labels_of(recipe, "eval") if "without" in label}
    for model, longest in lengths.items():
        for length in (512, longest):
            yield row("retrieval_accuracy", model, ("retrieval", model, length), length=length)
        yield row("perplexity", model, ("perplexity", model), loss_nats=loss(model))
    for model in settings.labels_of(recipe, "precision"):
        yield from of_precision(model)
    for model in settings.labels_of(recipe, "kvcomm"):
        yield from of_reuse(model)


def of_precision(model: str) -> Iterator[Result]:
    where: dict[str, Any] = {"weights": "trained", "rows": "shift", "layer": "all", "shift": 16}
    for length in (512, 4096):
        for arithmetic in ("bfloat16", "float32_rotation"):
            for first in ("kept", "hidden"):
                at = where | {"arithmetic": arithmetic, "first": first, "length": length}
                yield row("precision_attention_change", model, ("change", model, length, arithmetic, first), **at)
        at = where | {"arithmetic": "float32", "length": length}
        yield row("precision_first_attention", model, ("attention", model, length), **at)
        yield row("precision_first_attention", model, ("other", model, length), **at, first="dropped")


def of_reuse(model: str) -> Iterator[Result]:
    for arm in ("rotate", "kvcomm", "anchored", "dense_chunked"):
        where = {"arm": arm, "task": "retrieval"}
        for tokens in ("first", "all"):
            for kind in ("single", "all"):
                at = where | {"tokens": tokens, "kind": kind}
                yield row("kvcomm_kl", model, ("kl", model, arm, tokens, kind), **at)
        for kind in ("single", "two_hop", "override", "absent", "all"):
            at = where | {"kind": kind}
            yield row("kvcomm_accuracy_difference", model, ("difference", model, arm, kind), **at)
        for shuffled in (False, True):
            at = where | {"kind": "all", "shuffled": shuffled}
            yield row("kvcomm_judge_consistency", model, ("judge", model, arm, shuffled), **at)
    for layer in LAYERS["large" if model.startswith("large") else "small"]:
        for cause in ("content", "shift"):
            for part in ("key", "value"):
                at = {"cause": cause, "part": part, "layer": layer}
                yield row("kvcomm_variation", model, ("variation", model, cause, part, layer), **at)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(MINIATURE.parent))
    monkeypatch.syspath_prepend(str(MINIATURE))
    return {name: importlib.import_module(name) for name in ("claims", "recipe", "verdicts")}


def test_every_claim_measures_what_it_says(modules: dict[str, ModuleType]) -> None:
    rows = modules["verdicts"].Rows({0: list(measured(modules["recipe"]))})
    found = {claim.name: claim.estimate(rows).values for claim in modules["claims"].CLAIMS}
    assert found.keys() == EFFECTS.keys()
    for name, expected in EFFECTS.items():
        assert found[name] == pytest.approx((expected,)), name
