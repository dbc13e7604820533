"""A packed set of `anchorctx prepare` under Hugging Face's Trainer, with a weight for each token's loss.

.venv/bin/python examples/packed_rows.py [FOLDER]       some seconds on a CPU, with no network
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

from transformers import Trainer, TrainingArguments

from anchorctx.data.config import LossWeights, PrepareConfig
from anchorctx.data.prepare import prepare
from anchorctx.data.sources.source import SourceConfig
from anchorctx.data.sources.stdlib import StdlibConfig, documents, train_tokenizer
from anchorctx.integrations import RowDataset, attach, collate_rows, weighted_loss
from anchorctx.testing.tiny import text_model

ROW, STEPS = 512, 20
"""Tokens of a row; steps of two rows."""


def trainer(folder: Path) -> Trainer:
    """A small model on Python's standard library with planted facts: 1 on their answers, 0.1 on the text around."""
    tokenizer = train_tokenizer(vocabulary=512, sample_chars=200_000)
    tokenizer.save_pretrained(folder / "tokenizer")
    texts = itertools.islice(documents(StdlibConfig(facts=True, median_chars=500, max_chars=1000)), 120)
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in texts))
    packed = prepare(  # as anchorctx prepare out_dir=... 'sources=[{path: corpus.jsonl}]' weights=facts ...
        PrepareConfig(
            out_dir=str(folder / "packed"),
            sources=[SourceConfig(path=str(corpus))],
            tokenizer=str(folder / "tokenizer"),
            row_length=ROW,
            weights=LossWeights.facts,
        )
    )
    model = text_model(tokenizer, ROW, width=64, spread=0.1)  # in place of AutoModelForCausalLM.from_pretrained
    attach(model, pattern=None)  # None: the rows are laid out already
    model.loss_function = weighted_loss
    rows = RowDataset(packed.folder, pattern="anchor", model=model)
    arguments = TrainingArguments(
        str(folder / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,  # the same steps as two rows at once: Trainer counts both rows' tokens
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, data_collator=collate_rows, train_dataset=rows)


def main(folder: str) -> list[float]:
    """Train, print and return the loss of each step."""
    run = trainer(Path(folder))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    print("losses: " + ", ".join(f"{loss:.3f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
