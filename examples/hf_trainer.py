"""AnchorAttention under Hugging Face's `Trainer`: `AnchorCollator` is all there is to add. On a CPU, with no network.

.venv/bin/python examples/hf_trainer.py [FOLDER]        about half a minute; checkpoints, if any, go to the folder

For a checkpoint of yours on a GPU, load it with `attn_implementation="flash_attention_2"`; nothing is registered then.
To keep a collator that packs already, attach the model instead, as in `trl_sft.py` and `peft_lora.py`.
"""

from __future__ import annotations

import itertools
import sys
import tempfile

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, EvalPrediction, LlamaConfig, Trainer, TrainingArguments

from anchorctx.attention import register
from anchorctx.data.sources.stdlib import StdlibConfig, documents, train_tokenizer
from anchorctx.integrations import AnchorCollator

ROW, BATCH, STEPS = 1024, 4, 40
"""Tokens of a row, documents of a batch, steps."""


def predicted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(1, T') ids in place of (1, T', V) logits, before Trainer gathers the whole evaluation's."""
    return logits.argmax(-1)


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """The share of trained tokens that the token before predicts."""
    labels = np.asarray(found.label_ids)[:, 1:]
    right = np.asarray(found.predictions)[:, :-1] == labels
    return {"accuracy": float(right[labels != -100].mean())}


def trainer(folder: str) -> Trainer:
    """A small model on Python's standard library."""
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
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    train, held_out = data.select(range(STEPS * BATCH)), data.select(range(STEPS * BATCH, len(data)))
    return Trainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=accuracy,  # without it Trainer keeps nothing but losses
        preprocess_logits_for_metrics=predicted,
    )


def main(folder: str) -> list[float]:
    """Train, print and return the losses: of training every ten steps, then of held-out documents."""
    run = trainer(folder)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    evaluation = run.evaluate()
    losses.append(evaluation["eval_loss"])
    print(f"next tokens predicted right: {evaluation['eval_accuracy']:.1%}")
    print("losses: " + ", ".join(f"{loss:.3f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
