"""The examples against training written out plainly: 20 steps, each document alone behind its anchor.

Float32 and AdamW, which makes more of rounding than SGD. Measured: losses differ by at most 9.6e-7. The bound is 1e-5.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from anchorctx.integrations import detach

from .alone import Document, Recorder, curve, placed, split

EXAMPLES = Path(__file__).parents[3] / "examples"
TOLERANCE = 1e-5
# TRL and peft ask transformers for gradient checkpointing by its old name
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def example(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


def run(trainer: Any, plain: Any) -> tuple[list[float], list[list[Document]]]:
    """Its losses, and the documents of its steps as its collator gave them; `plain` learns as plainly as can be."""
    trainer.data_collator = recorder = Recorder(trainer.data_collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    config = plain.config
    steps = [placed(split(batch), config.max_position_embeddings, config.bos_token_id) for batch in recorder.batches]
    steps = steps[: len(losses)]  # the data loader is ahead of the trainer
    expected = curve(plain, steps, trainer.args.learning_rate, config.bos_token_id, clip=1.0)
    assert len(losses) == 20 and losses == pytest.approx(expected, abs=TOLERANCE)
    return losses, steps


def test_trl_packs_and_flattens_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="examples/trl_sft.py needs trl: pip install trl")
    trainer = example(monkeypatch, "trl_sft").trainer(str(tmp_path))
    plain = LlamaForCausalLM(trainer.model.config)  # a copy's forward, which TRL replaced, would be the model's own
    plain.load_state_dict(trainer.model.state_dict())
    losses, steps = run(trainer, plain)
    assert max(map(len, steps)) > 2 and losses[0] - losses[-1] > 0.5


def test_lora_on_conversations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="examples/peft_lora.py needs peft: pip install peft")
    trainer = example(monkeypatch, "peft_lora").trainer(str(tmp_path))
    plain = copy.deepcopy(trainer.model)
    detach(plain)
    losses, steps = run(trainer, plain)
    assert {len(documents) for documents in steps} == {4} and losses[0] - losses[-1] > 0.5
    assert all(document.labels[0] == -100 for documents in steps for document in documents)


def test_packed_rows_with_loss_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = example(monkeypatch, "packed_rows").trainer(tmp_path)
    plain = copy.deepcopy(trainer.model)
    detach(plain)
    steps = run_laid_out(trainer, plain)
    assert {weight for document in steps[0] for weight in document.weights or ()} >= {0.0, 1.0}


def test_the_collator_of_the_first_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = example(monkeypatch, "hf_trainer").trainer(str(tmp_path))
    trainer.args.max_steps, trainer.args.logging_steps, trainer.args.learning_rate = 20, 1, 1e-3
    steps = run_laid_out(trainer, copy.deepcopy(trainer.model))
    assert {len(documents) for documents in steps} == {4}


def run_laid_out(trainer: Any, plain: Any) -> list[list[Document]]:
    """The documents of its 20 steps, whose losses are those of the documents alone."""
    trainer.data_collator = recorder = Recorder(trainer.data_collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    n, anchor = trainer.args.gradient_accumulation_steps, int(recorder.batches[0]["input_ids"][0, 0])
    together = [recorder.batches[n * i : n * i + n] for i in range(len(losses))]
    steps = [[document for batch in batches for document in laid_out(batch)] for batches in together]
    expected = curve(plain, steps, trainer.args.learning_rate, anchor, clip=1.0)
    assert len(losses) == 20 and losses == pytest.approx(expected, abs=TOLERANCE) and losses[0] != losses[-1]
    return steps


def laid_out(batch: dict[str, Any]) -> list[Document]:
    """The documents of a batch that has copies of the anchor at position 0, which are taken off."""
    names = ("input_ids", "labels", "position_ids", "loss_weights")
    rows = [batch[name][0].tolist() for name in names if name in batch]
    starts = [i for i, position in enumerate(rows[2]) if position == 0]
    spans = zip(starts, [*starts[1:], len(rows[0])], strict=True)
    return [Document(*(row[a + 1 : b] for row in rows)) for a, b in spans]  # type: ignore[arg-type]
