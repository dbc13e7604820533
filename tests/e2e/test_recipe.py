"""A recipe for GPUs run as it stands, with a tiny stand-in for its checkpoint: corpus in, Hugging Face folder out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from anchorctx.data.sources.stdlib import Split, StdlibConfig, documents, train_tokenizer
from anchorctx.records.results import read_results

ROOT = Path(__file__).parents[2]
LENGTH = 65_536
pytestmark = pytest.mark.distributed


def write_corpus(path: Path, split: Split, characters: int) -> None:
    """Whole files of the standard library, up to so many characters, as JSON lines."""
    with path.open("w") as file:
        for document in documents(StdlibConfig(split=split)):
            if characters < 0:
                break
            characters -= len(document.text)
            file.write(json.dumps({"text": document.text}) + "\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What the recipe llama2_7b_64k makes and prints, on two CPU processes: a row of 65,536 tokens each, two steps."""
    root = tmp_path_factory.mktemp("recipe with a space")
    tokenizer = train_tokenizer(sample_chars=100_000)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=4096, **shape, bos_token_id=tokenizer.bos_token_id
        )
    ).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_corpus(root / "corpus.jsonl", Split.train, 900_000)
    write_corpus(root / "held_out.jsonl", Split.validation, 100_000)
    environment = os.environ | {
        "CORPUS": str(root / "corpus.jsonl"),
        "HELD_OUT": str(root / "held_out.jsonl"),
        "MODEL": str(root / "model"),
        "OUT": str(root / "run"),
        "GPUS": "2",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    overrides = ["model.dtype=float32", f"tokens_per_step={2 * LENGTH}", "steps=2", "optim.lr=0.01", "logging=wandb"]
    overrides.append("parallel.sequence_parallel=2")  # there are two processes, not four
    command = ["bash", str(ROOT / "recipes" / "gpu" / "run.sh"), "llama2_7b_64k", *overrides]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return root / "run", done


def it_makes_what_it_says(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = finished
    assert "held-out perplexity, each folder loaded fresh:" in done.stdout
    for name in ("exported/model.safetensors", "plots/loss.png", "plots/pattern.png", "run/manifest.json"):
        assert (out / name).is_file(), name


def the_exported_folder_has_the_new_length_and_theta(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder = finished[0] / "exported"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.max_position_embeddings == LENGTH
    assert model.config.rope_parameters["rope_theta"] == 5e6
    assert model.dtype is torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size


def perplexity_before_and_after_is_the_folders_own(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    before, after = (next(read_results(finished[0] / "eval" / name / "results.jsonl")) for name in ("before", "after"))
    assert before.metric == after.metric == "perplexity"
    assert before.n == after.n
    assert after.value < before.value  # two steps at a high rate: better than random, no more
    models = [
        json.loads((finished[0] / "eval" / n / "manifest.json").read_text())["config"]["model"]
        for n in ("before", "after")
    ]
    assert [Path(name).name for name in models] == ["model", "exported"]


def metrics_went_to_both_places(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run = finished[0] / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert max(row.get("perf/attention_flops_saved", 0.0) for row in rows) > 0.5
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))


def progress_was_visible(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    shown = finished[1].stderr
    assert "documents/s" in shown and "perplexity of after: 100%" in shown
    assert "step/s" in shown or "s/step" in shown  # whichever is above 1
    assert "Traceback" not in shown


def test_from_a_corpus_to_the_figures(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """One test, so that two processes that share the tests do not both make the run, which takes minutes."""
    for check in (
        it_makes_what_it_says,
        the_exported_folder_has_the_new_length_and_theta,
        perplexity_before_and_after_is_the_folders_own,
        metrics_went_to_both_places,
        progress_was_visible,
    ):
        check(finished)
