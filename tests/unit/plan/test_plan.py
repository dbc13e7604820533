"""`anchorctx plan` as a user calls it: verdicts, the search, the simulation, and what it says to bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from anchorctx.cli.main import main
from anchorctx.config import resolve
from anchorctx.models import ModelConfig
from anchorctx.plan import search as searching
from anchorctx.plan.config import CorpusConfig
from anchorctx.plan.planner import Plan
from anchorctx.plan.rows import typical_rows
from anchorctx.plan.search import search

from .planning import SMALL, planner

ROOT = Path(__file__).parents[3]
MODEL = "model.config={" + ", ".join(f"{name}: {value}" for name, value in SMALL.items()) + "}"
GPU_RECIPES = ROOT / "recipes" / "gpu"
RECIPES = {path.stem: 4 if path.stem == "llama2_7b_64k" else 8 for path in sorted(GPU_RECIPES.glob("*.yaml"))}
"""And the GPUs of 80 GB that they are for: A100, H100 for the longest rows."""


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_compose(name: str) -> None:
    config = resolve("train", [], str(GPU_RECIPES / f"{name}.yaml"))
    config.validate()
    length = config.model.max_length
    assert config.rows_per_step(length) == 8 and config.piece_tokens(length) >= 4096
    assert RECIPES[name] % config.parallel.sequence_parallel == 0


def assert_fits_as_its_header_says(name: str, tmp_path: Path) -> None:
    """The planner says that the recipe fits, and that it needs what its header says."""
    recipe = GPU_RECIPES / f"{name}.yaml"
    gpu, length = "H100" if name.endswith("_1m") else "A100", resolve("train", [], str(recipe)).model.max_length
    arguments = ["--recipe", str(recipe), f"gpu={gpu}", f"gpus={RECIPES[name]}", f"out_dir={tmp_path}"]
    assert main(["plan", *arguments, f"corpus.longest={length}"]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert plan["fits"] and plan["total"] < 0.9 * plan["usable"]
    header = " ".join(recipe.read_text().replace("#", " ").split())
    assert f"gpu={gpu} gpus={RECIPES[name]} corpus.longest={length}" in header
    assert f"total: fits {plan['total'] / 2**30:.1f} " in header
    assert f"{plan['cost']['seconds']:.1f} s" in header


def test_the_recipe_for_four_gpus_fits_as_its_header_says(tmp_path: Path) -> None:
    assert_fits_as_its_header_says("llama2_7b_64k", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "llama2_7b_64k"])
def test_the_other_recipes_fit_as_their_headers_say(name: str, tmp_path: Path) -> None:
    """Slow: rows of up to 524,288 tokens are traced, three to ten seconds each."""
    assert_fits_as_its_header_says(name, tmp_path)


def test_the_search_finds_the_fastest_that_fits() -> None:
    """Here shorter pieces do, which need no recomputation: whole rows take 2.07 GiB, of 2.04."""
    found = planner(gpus=2, gpu_memory_gib=2.04 / 0.95, tokens_per_step=2 * 4096)
    plan = search(found)
    assert plan.fits and plan.job.micro_tokens == 2048 and plan.job.every == 0
    assert found.plan(plan.parallel, plan.memory, plan.job.micro_tokens).parts == plan.parts
    ranked = sorted(searching._candidates(found), key=lambda candidate: candidate[0])
    faster = list(_until(ranked, plan))
    assert len(faster) > 3 and not any(found.plan(*configuration).fits for _, *configuration in faster)


def _until(ranked: list, plan: Plan) -> Iterator[tuple]:
    for candidate in ranked:
        if candidate[1:] == (plan.parallel, plan.memory, plan.job.micro_tokens):
            return
        yield candidate


def test_the_search_tries_pieces_up_to_a_gpus_share_of_the_step_and_the_longest_document() -> None:
    found = planner(corpus=CorpusConfig(rows=4, longest=2500), tokens_per_step=16 * 4096)
    assert searching.piece_sizes(found) == [1024, 2048, 3072, 4096, 4352, 8192]


def test_the_search_sums_no_pieces_in_bfloat16() -> None:
    found = planner(tokens_per_step=16 * 4096)
    several = [c for c in searching._candidates(found) if max(found.dealt(found.job(c[1], c[2], c[3])).pieces) > 1]
    assert several and all(parallel.zero_stage > 1 for _, parallel, *_ in several)


def test_with_room_enough_nothing_is_switched_on() -> None:
    plan = search(planner())
    assert (plan.job.every, plan.memory.mlp_tile, plan.parallel.sequence_parallel) == (0, 0, 1)
    assert not plan.parallel.offload_optimizer


def test_experts_are_planned_without_tiles() -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    found = planner(model=ModelConfig(config=SMALL | experts), row_length=512, gpu_memory_gib=2.16)
    assert all(memory.mlp_tile == 0 for _, _, memory, _ in searching._candidates(found))


def test_a_recipes_plan_is_shown_as_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = GPU_RECIPES / "llama3_8b_64k.yaml"
    assert main(["plan", "--recipe", str(recipe), "gpus=4", "--show"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["gpus"] == 4 and shown["model"]["max_length"] == 65536 and shown["pattern"] == "anchor"


def test_a_simulation_is_drawn_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan of a small model, found by search, scaled to 1,024 GPUs."""
    arguments = [MODEL, "row_length=2048", "corpus.rows=4", "search=true", "simulate=true", f"out_dir={tmp_path}"]
    assert main(["plan", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "fits, " in shown and "of full attention's operations are left out" in shown and "assumed" in shown
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["manifest"]["command"] == "plan" and written["plan"]["fits"]
    assert written["plan"]["total"] == pytest.approx(sum(v for k, v in written["plan"]["parts"].items() if k in PARTS))
    assert {point["gpus"] for point in written["scaling"]} == {2**n for n in range(11)}
    picture = (tmp_path / "scaling.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


PARTS = {"parameters", "gradients", "optimizer", "gathered", "activations", "logits", "working", "runtime"}


def test_rows_come_from_a_law_or_a_list(tmp_path: Path) -> None:
    drawn = typical_rows(CorpusConfig(rows=200, median=100, sigma=0.5), 5000)
    lengths = [b - a for row in drawn for a, b in zip(row.doc_offsets[1:-2], row.doc_offsets[2:-1], strict=True)]
    assert 95 < sorted(lengths)[len(lengths) // 2] < 105
    assert typical_rows(CorpusConfig(rows=2, median=100), 500) == typical_rows(CorpusConfig(rows=2, median=100), 500)
    (tmp_path / "lengths.txt").write_text("7\n7\n")
    (row,) = typical_rows(CorpusConfig(rows=1, lengths=str(tmp_path / "lengths.txt")), 20)
    assert row.doc_offsets == (0, 1, 8, 15, 20) and row.anchor_len == 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([MODEL], "the plan needs a row length: give row_length=..., model.max_length=... or corpus.packed=..."),
        (
            ["model.path=meta-llama/Llama-3-8B", "row_length=4096"],
            "is not known to the planner, and no folder or hub gives its configuration (",
        ),
        (
            ["model.path=meta-llama/Llama-3-8B", "row_length=4096"],
            "): did you mean meta-llama/Llama-3.1-8B? Else give its sizes in model.config; known are ",
        ),
        ([MODEL, "row_length=4096", "gpu=H1000"], "gpu=H1000 is not known: did you mean H100? choose A100, A800,"),
        ([MODEL, "row_length=4096", "gpus=0"], "gpus=0 must be at least 1"),
        (
            [MODEL, "row_length=4096", "gpus=6", "parallel.sequence_parallel=4"],
            "6 processes do not divide into groups of parallel.sequence_parallel=4: use 3, or start 8 processes",
        ),
        (
            [MODEL, "row_length=4096", "gpus=6", "parallel.sequence_parallel=3"],
            "=3 cannot share 8 attention heads and 2 key heads: it must divide the heads, and divide the key heads or "
            "be a multiple of them: use 2 (possible: 1, 2)",
        ),
        (
            [MODEL, "row_length=4096", "parallel.sequence_parallel=16"],
            "=16 needs at least as many processes, but there are 8: start 16, or use 8",
        ),
        (
            [MODEL, "row_length=4096", "tokens_per_step=50000"],
            "tokens_per_step=50000 must be a multiple of the row length, 4096: use 49152",
        ),
        ([MODEL, "row_length=4096", "parallel.zero_stage=0"], "parallel.zero_stage=0 must be between 1 and 3"),
        ([MODEL, "row_length=4096", "parallel=zero5"], "did you mean zero"),
        ([MODEL, "row_length=4096", "simulate=true"], "simulate=true draws a picture: give out_dir=..."),
        ([MODEL, "row_length=4096", "assume.link=0"], "assume.link=0.0 must be above 0 and at most 1"),
        ([MODEL, "row_length=4096", "corpus.lengths=none.txt"], "corpus.lengths=none.txt is not a file"),
        ([MODEL, "row_length=2"], "row_length=2 must be at least 3"),
        (
            [MODEL, "row_length=1024", "gpus=1", "search=true", "gpu_memory_gib=1"],
            "no configuration of 1 H100 fits a piece of 1,0",
        ),
        ([MODEL, "row_length=4096", "micro_rows=1"], "micro_rows moved: write micro_tokens=TOKENS, what a "),
        ([MODEL, "row_length=4096", "micro_tokens=2"], "micro_tokens=2 leaves no room for a document of two tokens "),
        (
            [MODEL, "row_length=4096", "micro_tokens=1024", "pattern=full", "parallel.sequence_parallel=2"],
            "micro_tokens=1024 x 2 processes cannot hold a row of 4096 tokens, and pattern=full makes each row one ",
        ),
        ([MODEL, "row_length=4096", "corpus.longest=0"], "corpus.longest=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence_with_what_would_do(
    overrides: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *overrides]) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("anchorctx plan: ")
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_no_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("12\nmany\n")
    assert main(["plan", MODEL, "row_length=4096", f"corpus.lengths={path}"]) == 2
    assert "lengths.txt:2 is no positive number of tokens ('many'): mend the line" in capsys.readouterr().err
