"""A packed set under Hugging Face's Trainer: its rows, documents alone, weights of the loss.

Float32. Measured: the losses of 20 steps differ from documents alone by at most 1.5e-6; the bound is 1e-5.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from anchorctx.attention import register
from anchorctx.data.packed_set import PackedSet, ShardWriter
from anchorctx.data.packing.shard import Row
from anchorctx.errors import UserError
from anchorctx.integrations import RowDataset, attach, collate_rows, weighted_loss
from anchorctx.layout import PackedLayout
from anchorctx.testing.tiny import text_model, word_tokenizer

from .alone import Document, curve

WORDS, ROW, ROWS = 48, 40, 40


def packed(folder: Path, weighted: bool = False) -> Path:
    """Rows of four documents and padding; in every third row the second document has two parts."""
    rng = np.random.default_rng(3)
    writer = ShardWriter(folder, ROW, WORDS, 1)
    for number in range(ROWS):
        ids = rng.integers(3, WORDS, ROW)
        ids[0], ids[2::2] = 1, ids[1:-1:2] * 7 % (WORDS - 3) + 3
        offsets = (0, 1, *(1 + rng.integers(4, 9, 4).cumsum()).tolist(), ROW)
        scattered = number % 3 == 0
        layout = PackedLayout(offsets, 1, doc_ids=(0, 1, 2, 3, 2, 4) if scattered else None, padding=True)
        weights = rng.integers(0, 4, ROW) / 2 if weighted else (ids > 5)
        weights = np.array(weights, np.float32)
        weights[list(offsets[:-1])] = 0  # what comes before is another document's
        weights[offsets[-2] :] = 0
        writer.add(Row(ids, weights, layout), documents=3 if scattered else 4)
    word_tokenizer(WORDS).save_pretrained(writer.folder / "tokenizer")
    writer.close({"fingerprint": "0" * 12, "row_length": ROW, "anchor_len": 1, "vocab_size": WORDS})
    return folder


def documents(packed_set: PackedSet, number: int) -> list[Document]:
    """A row's documents at their positions, one part of a document behind the other; padding is none."""
    row = packed_set.row(number)
    offsets, ids = row.layout.doc_offsets, row.layout.doc_ids or tuple(range(len(row.layout.doc_offsets) - 1))
    found = []
    for document in dict.fromkeys(ids[1:-1]):
        where = np.concatenate([np.arange(*offsets[i : i + 2]) for i, other in enumerate(ids) if other == document])
        tokens, weights = row.input_ids[where].tolist(), row.loss_weights[where].tolist()
        labels = [token if weight else -100 for token, weight in zip(tokens, weights, strict=True)]
        found.append(Document(tokens, labels, where.tolist(), weights))
    return found


def model() -> LlamaForCausalLM:
    return text_model(word_tokenizer(WORDS), ROW)


def trainer(folder: Path, rows: RowDataset, made: Any, **arguments: Any) -> Trainer:
    settings = {"max_steps": 20, "learning_rate": 1e-3, "optim": "adamw_torch", "lr_scheduler_type": "constant"}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    settings |= {"dataloader_pin_memory": False, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    options = TrainingArguments(str(folder), **settings | arguments)
    return Trainer(made, options, data_collator=collate_rows, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize(("weighted", "accumulation"), [(False, 1), (True, 2)])
def test_training_is_that_of_documents_alone(tmp_path: Path, weighted: bool, accumulation: int) -> None:
    made = model()
    plain = copy.deepcopy(made)
    attach(made, pattern=None)
    if weighted:
        made.loss_function = weighted_loss
    rows = RowDataset(packed(tmp_path / "set", weighted), model=made)
    assert rows.weighted == weighted
    arguments = {"per_device_train_batch_size": 2 // accumulation, "gradient_accumulation_steps": accumulation}
    run = trainer(tmp_path / "run", rows, made, **arguments)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    steps = [[d for i in (2 * n, 2 * n + 1) for d in documents(rows.packed, i)] for n in range(20)]
    assert losses == pytest.approx(curve(plain, steps, 1e-3), abs=1e-5) and losses[0] - losses[-1] > 0.1


def test_evaluation_is_the_loss_of_the_rows_and_keeps_no_logits(tmp_path: Path) -> None:
    made = model()
    plain = copy.deepcopy(made)
    attach(made, pattern=None)
    rows = RowDataset(packed(tmp_path / "set"))
    run = trainer(tmp_path / "run", rows, made, per_device_eval_batch_size=ROWS, prediction_loss_only=True)
    found = run.predict(rows)  # type: ignore[arg-type]
    steps = [[document for i in range(ROWS) for document in documents(rows.packed, i)]]
    assert found.predictions is None and found.metrics is not None
    assert found.metrics["test_loss"] == pytest.approx(curve(plain, steps, 1e-3)[0], abs=1e-5)


def test_a_worker_opens_the_set_anew(tmp_path: Path) -> None:
    rows = RowDataset(packed(tmp_path / "set"), "intra_doc")
    other = pickle.loads(pickle.dumps(rows))
    one, two = collate_rows([rows[0], rows[3]]), collate_rows([other[0], other[3]])
    assert one.keys() == two.keys() and len(other) == ROWS
    assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name])) for name in one)


def test_models_that_cannot_train_on_the_set_are_refused(tmp_path: Path) -> None:
    register()
    folder, made = packed(tmp_path / "set", weighted=True), model()
    with pytest.raises(UserError, match="attn_implementation='sdpa' would mix documents"):
        RowDataset(folder, model=made)
    attach(made, pattern=None)
    with pytest.raises(UserError, match="has loss weights other than 0 and 1, which the model's loss does not read"):
        RowDataset(folder, model=made)
    small = text_model(word_tokenizer(WORDS - 1), ROW)
    small.set_attn_implementation("anchor")
    with pytest.raises(UserError, match="has token ids up to 47, but the model's vocabulary ends at 46"):
        RowDataset(folder, model=small)
    with pytest.raises(UserError, match="holds no packed set"):
        RowDataset(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="pattern=anker is unknown"):
        RowDataset(folder, "anker")
