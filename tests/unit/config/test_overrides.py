"""Words of the command line: texts as they were typed, and a sentence for what Hydra's grammar does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorctx.config import quoted, resolve
from anchorctx.config.overrides import expand_home, for_hydra
from anchorctx.data.config import PrepareConfig
from anchorctx.errors import UserError

TRAIN = ["data.train=y", "out_dir=x"]

ODD = ["runs/Läufe", "runs/lr=2e-5", "a,b", "(a", "[a]", "[a", "a]", "#1", "it's", 'a "b"', "a~b", "{a: b}", "a: b"]
ODD += ["1e3", "5e12345", "true", "False", "1_000", "007", "sort(a)", "choice(a,b)", "a b", "李明", "a\\", "50%@x;y!"]


@pytest.mark.parametrize("typed", ODD)
def test_a_text_is_what_was_typed(typed: str) -> None:
    train = resolve("train", [*TRAIN, f"model.path={typed}", f"++data.validation={typed}"])
    assert (train.model.path, train.data.validation) == (typed, typed)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_survives_the_grammar(text: str) -> None:
    parser = OverridesParser.create()
    assert parser.parse_override(f"sources=[{{path: {quoted(text)}}}]").value() == [{"path": text}]
    plain = text.replace("\\", "/").strip(" \t'\"")  # Hydra's own escapes and quotes are understood, see below
    if plain and plain.lower() != "null" and not plain.isspace():
        assert parser.parse_override(for_hydra(f"out_dir={plain}", "prepare", PrepareConfig)).value() == plain


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("'a b'", "a b"),
        ('"a, b"', "a, b"),
        (r"runs/lr\=2e-5", "runs/lr=2e-5"),  # Hydra's own escapes
        (r"a\,b", "a,b"),
        ("null", None),
        ("NULL", None),
    ],
)
def test_what_hydra_users_quote_is_understood(typed: str, meant: str | None) -> None:
    assert resolve("train", [*TRAIN, f"model.path={typed}"]).model.path == meant


def test_a_model_is_a_text_or_a_list() -> None:
    def model(typed: str) -> Any:
        return resolve("eval", ["out_dir=x", f"model={typed}"]).model

    assert model("runs/lr=2e-5") == "runs/lr=2e-5" and model("1e3") == "1e3" and model("null") is None
    assert model("[a, 'b=c']") == ["a", "b=c"]


def test_interpolation_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert resolve("train", [*TRAIN, "out_dir=${oc.env:SCRATCH}/lr=1"]).out_dir == "/scratch/me/lr=1"


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("train", ["out_dir="], "out_dir= is empty: write out_dir=..."),
        ("train", ["data.train= "], "data.train= is empty: write data.train=..."),
        ("train", ["model.path="], "model.path= is empty: leave it out for its default, null"),
        ("eval", ["model="], "model= is empty: leave it out for its default, null"),
        ("report", ["runs=[a]", "out="], "out= is empty: leave it out for its default, report.html"),
        ("train", ["out_dir"], "out_dir has no '=': write key=value (anchorctx train --help lists the keys)"),
        (
            "eval",
            ["model=m", "evals=[perplexity,", "needle]", "seed=1"],
            "evals=[perplexity, was cut off at a space: put quotes around the whole, 'evals=[perplexity, needle]'",
        ),
        (
            "prepare",
            ["sources=[{path:", "a,", "format:", "text}]"],
            "sources=[{path: was cut off at a space: put quotes around the whole, 'sources=[{path: a, format: text}]'",
        ),
        ("eval", ["evals=[perplexity"], "evals=[perplexity ends too early: close its brackets and quotes"),
        (
            "prepare",
            ["sources=[{path: runs/Läufe}]"],
            "sources=[{path: runs/Läufe}] cannot be read from 'äufe}]' on: put a text with such signs in quotes of its "
            "own, as in sources=[{path: 'a, b.jsonl'}]",
        ),
        ("prepare", ["sources=[{path: a=b}]"], "sources=[{path: a=b}] cannot be read from '=b}]' on: put a text with"),
        (
            "prepare",
            ["sources=[{path: x, revision: 5e12345}]"],
            "revision: 5e12345 is read as inf, though it is a text: put it in quotes, revision: '5e12345'",
        ),
        ("prepare", ["sources=[{path: true}]"], "path: true is read as true, though it is a text: put it in quotes"),
        (
            "kvcomm",
            ["arms=[1e3]"],
            "arms=[1e3] is read as having 1000.0 in it, though it has texts: put them in",
        ),
        ("prepare", ["sources=[stdlib]"], "sources[0]=stdlib is not {key: value}: write sources=[{format: stdlib}]"),
        ("prepare", ["sources=[a.jsonl]"], "sources[0]=a.jsonl is not {key: value}: write sources=[{path: a.jsonl}]"),
        ("eval", ["models=[a]"], "models[0]=a is not {key: value}: write models=[{path: a}]"),
        ("eval", ["corpus=x.jsonl"], "corpus=x.jsonl is not {key: value}: write corpus={path: x.jsonl}"),
        ("train", ["steps=1,2"], "steps=1,2 has several values, and a command runs with one: write one of them"),
        ("train", ["pattern=anchr"], "pattern=anchr is unknown: did you mean 'anchor'? choose full, "),
        ("prepare", ["pack.policy=bestfit"], "pack.policy=bestfit is unknown: did you mean 'best_fit'? choose "),
        ("eval", ["evals=[perplexty]"], "evals[0]=perplexty is unknown: did you mean 'perplexity'? choose "),
        ("prepare", ["sources=[{path: x, format: json}]"], "format=json is unknown: did you mean 'jsonl'? choose "),
    ],
)
def test_mistakes_are_one_sentence(command: str, words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(command, words)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_numbers_that_are_texts_without_loss_are_taken(tmp_path: Path) -> None:
    found = resolve("prepare", ["out_dir=x", "tokenizer=t", "row_length=9", "sources=[{path: x, revision: 1234567}]"])
    assert found.sources[0].revision == "1234567"


def test_texts_of_a_recipe_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    recipe = tmp_path / "a recipe=1.yaml"  # the file's own name is no matter of grammar either
    lines = ["defaults: [prepare, _self_]", "out_dir: ~/x", "tokenizer: t", "row_length: 9", "sources:", "  - path: x"]

    def revision(text: str) -> str | None:
        recipe.write_text("\n".join([*lines, f"    revision: {text}", ""]))
        return resolve("prepare", [], str(recipe)).sources[0].revision

    assert revision("1234567") == "1234567" and revision("'5e12345'") == "5e12345" and revision("null") is None
    for typed, read in (("5e12345", "inf"), ("0123", "83"), ("true", "true"), ("1_000", "1000")):
        with pytest.raises(UserError) as error:
            revision(typed)
        expected = f"sources.0.revision: {typed} is read as {read}, though it is a text: put it in quotes"
        assert expected in str(error.value)


def test_the_home_folder_is_put_for_tildes_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    train = resolve("train", ["data.train=~/packed", "out_dir=~", "model.path=a~b", "model.config.x='~/y'"])
    assert (train.data.train, train.out_dir, train.model.path) == ("/home/me/packed", "/home/me", "a~b")
    assert train.model.config == {"x": "~/y"}  # a free dictionary: not ours
    words = ["out_dir=x", "tokenizer=~/t", "row_length=9", "sources=[{path: '~/c'}]"]
    prepare = resolve("prepare", words)
    assert (prepare.tokenizer, prepare.sources[0].path) == ("/home/me/t", "/home/me/c")
    plot = resolve("plot", ["out_dir=x", "results=['~/a', b]"])
    assert plot.results == ["/home/me/a", "b"]
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # nobody knows a home folder
    with pytest.raises(UserError, match="out_dir=~/x needs a home folder, and HOME is not set: write the whole path"):
        expand_home(resolve("train", ["data.train=y", "out_dir=~/x"]))
