"""How much of what: token weights, the repetition cap, length upsampling, deduplication; and the ready mixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorctx.config import conf_dir, resolve
from anchorctx.data.config import PrepareConfig
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.packing.config import PackConfig, Policy
from anchorctx.data.packing.mixture import MixtureBy, MixtureConfig, draw, duplicates
from anchorctx.data.prepare import prepare
from anchorctx.data.sources.source import SourceConfig
from anchorctx.errors import UserError

from ..byte_corpus import byte_tokenizer, texts_in

NAMES = ["web", "books", "code"]


@pytest.fixture
def lengths() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 200, 3000)


@pytest.fixture
def group() -> np.ndarray:
    return np.random.default_rng(1).choice(3, 3000, p=[0.7, 0.2, 0.1])


def taken(config: MixtureConfig, group: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copies of each document, and tokens of each source."""
    config.validate()
    copies = draw(config, NAMES, group, lengths, np.ones(len(lengths), bool))
    return copies, np.bincount(group, lengths * copies)


def test_shares_are_of_tokens_to_the_nearest_document(lengths: np.ndarray, group: np.ndarray) -> None:
    config = MixtureConfig(weights={"web": 2, "books": 1, "code": 1}, tokens=100_000, max_repeats=4)
    copies, tokens = taken(config, group, lengths)
    assert (np.abs(tokens - [50_000, 25_000, 25_000]) <= 100).all()  # half of the longest document
    assert copies[group == 0].max() == 1 and set(copies[group == 2].tolist()) <= {0, 1}


def test_without_a_total_the_scarcest_source_decides(lengths: np.ndarray, group: np.ndarray) -> None:
    own = np.bincount(group, lengths)
    config = MixtureConfig(weights={"web": 1, "books": 1, "code": 1})
    copies, tokens = taken(config, group, lengths)
    assert tokens[2] == own[2] and (copies[group == 2] == 1).all()
    assert (np.abs(tokens - own[2]) <= 100).all()
    config.max_repeats = 2.5
    copies, tokens = taken(config, group, lengths)
    assert abs(tokens[2] - 2.5 * own[2]) <= 100 and set(copies[group == 2].tolist()) == {2, 3}


def test_the_repetition_cap_is_kept(lengths: np.ndarray, group: np.ndarray) -> None:
    own = int(np.bincount(group, lengths)[2])
    config = MixtureConfig(weights={"web": 1, "books": 1, "code": 2}, tokens=5 * own, max_repeats=2)
    with pytest.raises(UserError) as error:
        taken(config, group, lengths)
    assert str(error.value) == (
        f"code has {own:,} tokens, but 50.0% of mixture.tokens={5 * own:,} needs them 2.50 times, above "
        "mixture.max_repeats=2: lower tokens or its weight, or raise max_repeats"
    )
    config.max_repeats = 2.5
    assert abs(taken(config, group, lengths)[1][2] - 2.5 * own) <= 100


def test_length_upsampling_keeps_the_shares_of_the_sources(lengths: np.ndarray, group: np.ndarray) -> None:
    config = MixtureConfig(
        weights={"web": 2, "books": 1, "code": 1}, long_from=150, long_share={"*": 0.7, "code": 1.0}, tokens=60_000
    )
    config.max_repeats = 5
    copies, tokens = taken(config, group, lengths)
    assert (np.abs(tokens - [30_000, 15_000, 15_000]) <= 250).all()
    long = np.bincount(group, lengths * copies * (lengths >= 150))
    assert np.abs(long / tokens - [0.7, 0.7, 1.0]).max() < 0.02
    assert copies[(group == 2) & (lengths < 150)].sum() == 0
    before = np.bincount(group, lengths * (lengths >= 150)) / np.bincount(group, lengths)
    assert (before < 0.5).all()


def test_what_is_drawn_is_a_function_of_the_seed(lengths: np.ndarray, group: np.ndarray) -> None:
    def drawn(seed: int) -> list[int]:
        weights = {"web": 1.0, "books": 1.0, "code": 1.0}
        return taken(MixtureConfig(weights=weights, seed=seed), group, lengths)[0].tolist()

    assert drawn(0) == drawn(0) != drawn(1)


def test_duplicates_are_all_but_the_first() -> None:
    hashes = np.array([[1, 2], [3, 4], [1, 2], [2, 1], [3, 4], [3, 4]], np.uint64)
    assert duplicates(hashes).tolist() == [False, False, True, False, True, True]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"weights": {"web": 0}}, "mixture.weights.web=0 must be above 0: remove the source to leave it out"),
    ({"weights": {"web": -1}}, "mixture.weights.web=-1 must be above 0: remove the source to leave it out"),
    ({"weights": {"web": float("nan")}}, "mixture.weights.web=nan must be above 0: remove the source to leave it out"),
    (
        {"weights": {"web": 1, "books": 1, "code": 1, "boks": 1}},
        "mixture.weights names boks, but the sources are web, books, code: correct it",
    ),
    (
        {"weights": {"web": 1, "books": 1}},
        "mixture.weights has no weight for source code: give each of web, books, code one",
    ),
    ({"tokens": 5}, "mixture.tokens and mixture.long_share need mixture.weights: give each source a weight"),
    ({"max_repeats": 0}, "mixture.max_repeats=0 must be above 0: 1 repeats nothing"),
    ({"long_from": 4096}, "mixture.long_from and mixture.long_share belong together: set both, or neither"),
    ({"long_share": {"web": 1.5}, "long_from": 9}, "mixture.long_share.web=1.5 must be 0 to 1"),
    (
        {"weights": {"web": 1, "books": 1, "code": 1}, "long_from": 4096, "long_share": {"books": 1.0}},
        "books (documents of 4,096 tokens or more) has no document, but 33.3% of the mixture: change its weight or "
        "long_share",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_mixtures(options: dict[str, Any], message: str, lengths: np.ndarray, group: np.ndarray) -> None:
    with pytest.raises(UserError) as error:
        taken(MixtureConfig(**options), group, lengths)
    assert str(error.value) == message


# -- as a user runs it ------------------------------------------------------------------------------------------------


def letters(folder: Path, name: str, letter: str, count: int, domain: str = "") -> SourceConfig:
    """`count` documents of 9 letters: each is `letter`, then its number."""
    file = folder / f"{name}.jsonl"
    rows = ({"text": f"{letter}{i:08d}", "meta": {"kind": domain or name}} for i in range(count))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(file), name=name, domain_field="meta.kind")


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer", bos_token="<s>", eos_token="</s>")
    sources = [letters(tmp_path, "web", "w", 100), letters(tmp_path, "books", "b", 10)]
    return PrepareConfig(
        out_dir=str(tmp_path / "out"), sources=sources, tokenizer=str(tokenizer), row_length=64, append_eos=False
    )


def check_account(packed: PackedSet) -> dict[str, Any]:
    """The manifest's account balances for each source, by its numbers alone; returns it."""
    account = packed.manifest["accounting"]
    for counts in account["sources"].values():
        came = counts["document_tokens"] + counts["eos_tokens"] + counts["repeated"]
        in_rows = counts["trained"] + counts["first_tokens"] + counts["zero_weight"]
        assert came == in_rows + sum(counts["dropped"].values())
    return account


@pytest.mark.parametrize("by", MixtureBy)
def test_the_realised_mixture_is_in_the_manifest(config: PrepareConfig, by: MixtureBy) -> None:
    config.mixture = MixtureConfig(by=by, weights={"web": 0.75, "books": 0.25}, max_repeats=2)
    packed = prepare(config)
    mixture = packed.manifest["mixture"]
    assert mixture["wanted"] == {"web": 0.75, "books": 0.25}
    assert mixture["realised"] == {
        "web": {"tokens": 540, "share": 0.75, "passes": 0.6},
        "books": {"tokens": 180, "share": 0.25, "passes": 2.0},
    }
    texts = texts_in(packed)
    assert sorted(t for t in texts if t[0] == "b") == sorted(2 * [f"b{i:08d}" for i in range(10)])
    assert len({t for t in texts if t[0] == "w"}) == 60
    account = check_account(packed)
    assert account["sources"]["web"]["dropped"] == {"not in the mixture": 360}
    assert account["sources"]["books"]["repeated"] == 90


def test_duplicates_are_dropped_across_sources_and_counted(config: PrepareConfig, tmp_path: Path) -> None:
    config.sources.append(letters(tmp_path, "again", "b", 15))
    config.mixture = MixtureConfig(deduplicate=True)
    packed = prepare(config)
    texts = texts_in(packed)
    assert len(texts) == len(set(texts)) == 115
    account = check_account(packed)
    assert account["dropped"] == {"duplicate": 90} and account["sources"]["again"]["dropped"] == {"duplicate": 90}


@pytest.mark.parametrize("seed", range(12))
def test_the_account_of_random_mixtures_balances(config: PrepareConfig, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    config.sources = [
        letters(tmp_path, name, letter, int(rng.integers(3, 60)))
        for name, letter in zip(NAMES, rng.choice(list("ab"), 3), strict=True)
    ]
    weights = {name: float(rng.uniform(0.2, 3)) for name in NAMES}
    config.mixture = MixtureConfig(weights=weights, max_repeats=float(rng.uniform(0.5, 3)), deduplicate=seed % 2 == 0)
    config.pack = PackConfig(policy=list(Policy)[seed % 3], min_length=int(rng.integers(1, 9)))
    config.append_eos = seed % 4 > 1
    try:
        packed = prepare(config)
    except UserError as error:  # all of a source are duplicates of another's
        assert config.mixture.deduplicate and "has no document, but" in str(error)
        return
    check_account(packed)
    realised, whole = packed.manifest["mixture"]["realised"], sum(weights.values())
    total = sum(found["tokens"] for found in realised.values())
    for name, weight in weights.items():
        assert abs(realised[name]["tokens"] - total * weight / whole) <= 5 + 40 * (config.pack.min_length > 1)


def test_what_is_mixed_changes_the_fingerprint(config: PrepareConfig) -> None:
    fingerprints = set()
    for mixture in (
        MixtureConfig(),
        MixtureConfig(deduplicate=True),
        MixtureConfig(weights={"web": 1, "books": 1}),
        MixtureConfig(weights={"web": 2, "books": 1}),
        MixtureConfig(weights={"web": 1, "books": 1}, seed=1),
    ):
        config.mixture = mixture
        fingerprints.add(prepare(config).fingerprint)
    assert len(fingerprints) == 5


def test_weights_of_unknown_sources_stop_it_before_anything_is_tokenised(config: PrepareConfig) -> None:
    config.mixture.weights = {"web": 1, "boks": 1}
    with pytest.raises(UserError, match="mixture.weights names boks, but the sources are web, books: correct it"):
        prepare(config)
    assert not Path(config.out_dir).exists()


def test_two_sources_of_one_name(config: PrepareConfig) -> None:
    config.sources[1].name = "web"
    with pytest.raises(UserError, match="2 sources have name=web: give each a name of its own, or none"):
        prepare(config)
    config.sources[0].name = config.sources[1].name = ""
    config.sources[1].path = config.sources[0].path
    assert list(prepare(config).manifest["accounting"]["sources"]) == ["web.jsonl #1", "web.jsonl #2"]


# -- the ready ones ---------------------------------------------------------------------------------------------------

NEEDED = ["out_dir=x", "tokenizer=t", "row_length=128", "sources=[{path: c}]"]


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "mixture").glob("*.yaml")))
def test_ready_mixtures_compose_and_add_up(name: str) -> None:
    mixture = resolve("prepare", [*NEEDED, f"mixture={name}"]).mixture
    mixture.validate()
    assert len(mixture.weights) >= 7 and sum(mixture.weights.values()) == pytest.approx(1, abs=0.021)
    assert mixture.long_from and mixture.long_share


def test_overrides_of_a_ready_mixture() -> None:
    mixture = resolve("prepare", [*NEEDED, "mixture=upsampledmix_128k", "mixture.tokens=5000000"]).mixture
    assert mixture.tokens == 5_000_000 and mixture.by is MixtureBy.domain
    assert resolve("prepare", NEEDED).mixture == MixtureConfig()
