"""AnchorAttention under Hugging Face's `Trainer`: the collator is all there is to add. On a CPU, with no network.

.venv/bin/python examples/hf_trainer.py [FOLDER]        about half a minute; checkpoints, if any, go to the folder

For a checkpoint of yours on a GPU, load it with `attn_implementation="flash_attention_2"`; nothing is registered then.
"""

from __future__ import annotations

import itertools
import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from anchorctx.attention import register
from anchorctx.data.sources.stdlib import StdlibConfig, documents, train_tokenizer
from anchorctx.integrations import AnchorCollator

ROW, BATCH, STEPS = 1024, 4, 40
"""Tokens of a row, documents of a batch, steps."""


def main(folder: str) -> list[float]:
    """Train, print and return the losses: of training every ten steps, then of held-out documents."""
    # documents: Python's standard library, cut to lengths around 250 tokens
    tokenizer = train_tokenizer(vocabulary=512, sample_chars=200_000)
    config = StdlibConfig(facts=True, median_chars=500, max_chars=2000)
    texts = [document.text for document in itertools.islice(documents(config), STEPS * BATCH + 16)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][: ROW - 1] for text in texts]
    data = Dataset.from_dict({"input_ids": ids})

    torch.manual_seed(0)
    register()  # attn_implementation="anchor": a CPU has no flash attention of transformers' own
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=ROW,
        ),
        attn_implementation="anchor",
    )
    collator = AnchorCollator(tokenizer, ROW, "anchor", max_tokens=BATCH * ROW, model=model)
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=1e-2,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    train, held_out = data.select(range(STEPS * BATCH)), data.select(range(STEPS * BATCH, len(data)))
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=train, eval_dataset=held_out)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses.append(trainer.evaluate()["eval_loss"])
    print("losses: " + ", ".join(f"{loss:.3f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
