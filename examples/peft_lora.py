"""LoRA adapters on conversations: a chat template, masked prompts, peft, and transformers' own collator and Trainer.

.venv/bin/python examples/peft_lora.py [FOLDER]         some seconds on a CPU, with no network; needs peft
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found]
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.integrations import attach
from anchorctx.testing.tiny import text_model

ROW, BATCH, STEPS = 512, 4, 20
"""Positions of a row, conversations of a batch, steps."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}### {{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)
"""Your tokenizer has one of its own."""


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Sums, asked and answered."""
    return [
        [
            {"role": "user", "content": f"What is {a} plus {b}?" + " Please answer." * (a % 3)},
            {"role": "assistant", "content": f"{a} plus {b} is {a + b}."},
        ]
        for a, b in ((17 * i % 90, 29 * i % 80) for i in range(count))
    ]


def tokenized(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """Ids of one conversation, and labels that are -100 on everything but the answer."""
    prompt: Any = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    ids: Any = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids[: len(prompt)] == prompt, "the template must not change a prompt when its answer follows"
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


def trainer(folder: str) -> Trainer:
    """A small random model in place of a checkpoint; its weights stay, the adapters are trained."""
    tokenizer = train_tokenizer(vocabulary=512, sample_chars=200_000)
    tokenizer.chat_template = TEMPLATE
    data = Dataset.from_list([tokenized(tokenizer, messages) for messages in conversations(STEPS * BATCH)])
    torch.manual_seed(0)  # of the adapters
    model = get_peft_model(
        text_model(tokenizer, ROW, width=64, spread=0.1),  # in place of AutoModelForCausalLM.from_pretrained
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    attach(model)  # the template begins with BOS, which is each conversation's copy of the anchor
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, data_collator=DataCollatorWithFlattening(), train_dataset=data)


def main(folder: str) -> list[float]:
    """Train, print and return the loss of each step."""
    run = trainer(folder)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    print("losses: " + ", ".join(f"{loss:.3f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
