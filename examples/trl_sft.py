"""AnchorAttention under TRL's SFTTrainer, which packs and flattens as it always does: `attach` is all there is to add.

.venv/bin/python examples/trl_sft.py [FOLDER]           about half a minute on a CPU, with no network; needs trl
"""

from __future__ import annotations

import itertools
import sys
import tempfile

from datasets import Dataset
from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

from anchorctx.data.sources.stdlib import StdlibConfig, documents, train_tokenizer
from anchorctx.integrations import attach
from anchorctx.testing.tiny import text_model

ROW, STEPS = 512, 20
"""Tokens of a row, steps of one row each."""


def trainer(folder: str) -> SFTTrainer:
    """A small model of its own, on Python's standard library, packed by TRL."""
    tokenizer = train_tokenizer(vocabulary=512, sample_chars=200_000)
    config = StdlibConfig(facts=True, median_chars=300, max_chars=1000)
    data = Dataset.from_dict({"text": [document.text for document in itertools.islice(documents(config), 120)]})
    model = text_model(tokenizer, 2 * ROW, width=64, spread=0.1)  # in place of AutoModelForCausalLM.from_pretrained
    attach(model)  # before or after the trainer is made
    arguments = SFTConfig(
        folder,
        packing=True,  # padding_free=True without packing does as well
        max_length=ROW,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)


def main(folder: str) -> list[float]:
    """Train, print and return the loss of each step."""
    run = trainer(folder)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    print("losses: " + ", ".join(f"{loss:.3f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
