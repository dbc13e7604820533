"""Two steps of Hugging Face's `Trainer` with the collator: losses and weights go to a file.

[torchrun ...] hf_trainer.py FILE DOCUMENTS_OF_A_BATCH
"""

import os
import sys

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from anchorctx.attention import register
from anchorctx.integrations import AnchorCollator
from anchorctx.testing.tiny import text_model, word_tokenizer

LENGTHS = (9, 8, 7, 10, 8, 9, 7, 8)
"""Two fit a row of 20, three do not: batches of two and of four lay the same rows out."""

generator = torch.Generator().manual_seed(0)
ids = [torch.randint(3, 48, (n,), generator=generator).tolist() for n in LENGTHS]
labels = [[*[-100] * (i % 4 * 2), *row[i % 4 * 2 :]] for i, row in enumerate(ids)]
register()
tokenizer = word_tokenizer(48)
model = text_model(tokenizer, 20)
model.set_attn_implementation("anchor")
arguments = TrainingArguments(
    sys.argv[1] + "_run",
    max_steps=2,
    per_device_train_batch_size=int(sys.argv[2]),
    train_sampling_strategy="sequential",
    optim="sgd",
    learning_rate=0.1,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    ddp_backend="gloo" if "RANK" in os.environ else None,
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
collator = AnchorCollator(tokenizer, 20, max_tokens=60, model=model)
data = Dataset.from_dict({"input_ids": ids, "labels": labels})
trainer = Trainer(model, arguments, data_collator=collator, train_dataset=data)
trainer.train()
if os.environ.get("RANK", "0") == "0":
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save({"losses": losses, "weights": [p.detach() for p in model.parameters()]}, sys.argv[1])
