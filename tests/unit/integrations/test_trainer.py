"""Hugging Face's `Trainer` with the collator: what it makes of batches changes nothing of the loss.

Float32. Measured: weights that two steps move by 0.14 differ by at most 1.2e-7, losses not at all, and evaluation from
documents alone through eager attention by 3.6e-7. The bounds are 1e-6.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from anchorctx.attention import register
from anchorctx.errors import UserError
from anchorctx.integrations import AnchorCollator, row_starts
from anchorctx.testing.tiny import text_model, word_tokenizer

ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-6
WORDS, ROW = 48, 20
LENGTHS = (9, 8, 7, 10, 8, 9, 7, 8)
"""Of a row's 19 places any two documents fit and no three: batches of two and of four lay the same rows out."""


def token_ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, WORDS, (n,), generator=generator).tolist() for n in LENGTHS]


def dataset() -> Dataset:
    """Prompts of different lengths are masked, so that batches do not have the same number of trained tokens."""
    ids = token_ids()
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [[*[-100] * (i % 4 * 2), *row[i % 4 * 2 :]] for i, row in enumerate(ids)]}
    )


def model() -> LlamaForCausalLM:
    register()
    made = text_model(word_tokenizer(WORDS), ROW)
    made.set_attn_implementation("anchor")
    return made


def trainer(folder: Path, data: Any, collator: AnchorCollator | None = None, **arguments: Any) -> Trainer:
    made = model()
    settings = {
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
    }
    settings |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.0}
    settings |= {"dataloader_pin_memory": False, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2}
    collator = collator or AnchorCollator(word_tokenizer(WORDS), ROW, max_tokens=60, model=made)
    options = TrainingArguments(str(folder), **settings | arguments)
    return Trainer(made, options, data_collator=collator, train_dataset=data, eval_dataset=data)


def trained(folder: Path, data: Any, **arguments: Any) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of the steps, weights at the end."""
    run = trainer(folder, data, **arguments)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, [parameter.detach() for parameter in run.model.parameters()]


def mean_loss(examples: list[list[int]], labels: list[list[int]], starts: list[int]) -> float:
    """Of documents, each alone behind its anchor through eager attention."""
    plain = model()
    plain.set_attn_implementation("eager")
    losses = []
    for ids, targets, start in zip(examples, labels, starts, strict=True):
        positions = torch.tensor([[0, *range(start, start + len(ids))]])
        inputs = {"input_ids": torch.tensor([[1, *ids]]), "attention_mask": torch.ones(1, len(ids) + 1)}
        with torch.no_grad():
            logits = plain(**inputs, position_ids=positions, use_cache=False).logits[0, 1:-1]
        expected = torch.tensor(targets[1:])
        losses.append(torch.nn.functional.cross_entropy(logits, expected, reduction="none")[expected != -100])
    return float(torch.cat(losses).mean())


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[torch.Tensor]]:
    return trained(tmp_path_factory.mktemp("plain"), dataset())


@pytest.mark.parametrize(
    "arguments",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 2},
        {"activation_checkpointing": True},
    ],
    ids=["accumulation", "workers", "checkpointing"],
)
def test_the_same_steps_by_another_way(tmp_path: Path, plainly: Any, arguments: dict[str, Any]) -> None:
    losses, weights = trained(tmp_path, dataset(), **arguments)
    assert losses == pytest.approx(plainly[0], abs=TOLERANCE) and abs(losses[0] - losses[1]) > 0.01
    assert max(float((a - b).abs().max()) for a, b in zip(weights, plainly[1], strict=True)) < TOLERANCE


def test_the_test_of_accumulation_would_see_a_mean_of_means(tmp_path: Path, plainly: Any) -> None:
    """The two batches of a step train different numbers of tokens."""
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    run = trainer(tmp_path, dataset(), **arguments)
    run.model_accepts_loss_kwargs = False  # then Trainer divides by the number of batches
    run.train()
    assert abs(run.state.log_history[0]["loss"] - plainly[0][0]) > 1e-3


def test_evaluation_is_the_mean_over_batches_of_documents_alone(tmp_path: Path) -> None:
    """Trainer's own rule: each batch counts the same, however many tokens it trains."""
    found = trainer(tmp_path, dataset()).evaluate()["eval_loss"]
    data, starts = dataset(), row_starts(LENGTHS, ROW)
    pairs = [slice(i, i + 2) for i in range(0, len(LENGTHS), 2)]
    expected = [mean_loss(data["input_ids"][pair], data["labels"][pair], starts[pair]) for pair in pairs]
    assert found == pytest.approx(sum(expected) / len(expected), abs=TOLERANCE)


def test_predictions_come_with_their_labels(tmp_path: Path) -> None:
    """As `compute_metrics` gets them: batches of different lengths, padded by Trainer."""
    found = trainer(tmp_path, dataset()).predict(dataset())
    longest = max(LENGTHS[i] + LENGTHS[i + 1] + 2 for i in range(0, len(LENGTHS), 2))
    assert found.predictions.shape == (4, longest, WORDS) and found.label_ids.shape == (4, longest)
    trained_tokens = [label for row in dataset()["labels"] for label in row[1:] if label != -100]
    assert found.label_ids[found.label_ids != -100].tolist() == trained_tokens


def test_texts_need_unused_columns(tmp_path: Path) -> None:
    texts = [" ".join(f"w{i}" for i in ids[:-1]) for ids in token_ids()]  # EOS comes on top
    data = Dataset.from_dict({"text": texts})
    losses, _ = trained(tmp_path, data, remove_unused_columns=False, max_steps=1)
    ids = Dataset.from_dict({"input_ids": [[*ids[:-1], 2] for ids in token_ids()]})
    assert losses == pytest.approx(trained(tmp_path, ids, max_steps=1)[0], abs=TOLERANCE)
    streamed = IterableDataset.from_generator(lambda: ({"text": text} for text in texts))
    with pytest.raises(UserError, match="no columns at all: .*Trainer needs remove_unused_columns=False"):
        trained(tmp_path, streamed, max_steps=1)


def test_the_datasets_positions_reach_the_model(tmp_path: Path) -> None:
    """`position_ids` is an argument of the model's forward, so that Trainer keeps the column."""
    row = 1 + sum(LENGTHS)
    starts = row_starts(LENGTHS, row)
    positions = [list(range(start, start + n)) for start, n in zip(starts, LENGTHS, strict=True)]
    data = dataset().add_column("position_ids", positions)
    found = trainer(tmp_path, data, AnchorCollator(word_tokenizer(WORDS), row)).evaluate()["eval_loss"]
    labels = dataset()["labels"]
    expected = [
        mean_loss(token_ids()[i : i + 2], labels[i : i + 2], starts[i : i + 2]) for i in range(0, len(LENGTHS), 2)
    ]
    assert found == pytest.approx(sum(expected) / len(expected), abs=TOLERANCE)


def test_the_example_trains() -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "hf_trainer.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(loss) for loss in done.stdout.splitlines()[-1].removeprefix("losses: ").split(", ")]
    assert len(losses) == 5 and losses[0] - 0.3 > losses[3] and abs(losses[4] - losses[3]) < 0.3
