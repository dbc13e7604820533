"""A run's checkpoint as a Hugging Face folder: safetensors, tokenizer, and a config with the new length and RoPE.

The folder loads with plain `AutoModelForCausalLM.from_pretrained`, on machines without this package. It is written
beside, loaded back, its logits compared with the checkpoint's weights, and only then renamed.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from anchorctx.errors import UserError
from anchorctx.models.load import fill, read_config, read_tokenizer
from anchorctx.records.files import StagedFolder
from anchorctx.train import checkpoint
from anchorctx.train.config import ExportConfig
from anchorctx.train.loop import MODEL

WRAPPER = "model."
"""What `CausalLMLoss` puts before the names of the weights."""


def export(config: ExportConfig) -> Path:
    """Write the Hugging Face folder; returns it."""
    out, run = Path(config.out_dir), Path(config.run)
    if out.exists():
        raise UserError(f"out_dir={out} exists already: remove it, or choose another")
    folder = _checkpoint(run, config.step)
    disable_progress_bar()  # avoid a second progress bar
    model = _restore(run / MODEL, folder, getattr(torch, config.dtype.value))
    # Another export into the same folder writes beside it too, and the first to finish wins.
    staged = StagedFolder(out, marker="config.json")
    try:
        model.save_pretrained(staged.folder)
        read_tokenizer(str(run / MODEL)).save_pretrained(staged.folder)
        verify_export(model, staged.folder)
        return staged.publish()
    finally:
        staged.discard()


def verify_export(model: PreTrainedModel, folder: Path, tokens: int = 64) -> None:
    """Load `folder` as a user would and compare its logits with `model`'s on random tokens: they must be equal."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, tokens), generator=generator)
    with torch.no_grad():
        expected, found = model.eval()(ids).logits, loaded(ids).logits
    # Same dtype, same code, same machine: equal to the last bit, or something was lost on the way.
    if not torch.equal(expected, found):
        worst = (expected - found).abs().max().item()
        raise UserError(
            f"the export does not reproduce the checkpoint: logits differ by up to {worst:.2e}; not written"
        )


def _checkpoint(run: Path, step: int | None) -> Path:
    root = run / "checkpoints"
    found = checkpoint.complete(root)
    if not found:
        raise UserError(f"run={run} has no complete checkpoint: name the out_dir of a training run that wrote one")
    folder = found[-1] if step is None else checkpoint.step_folder(root, step)
    if folder not in found:
        steps = ", ".join(str(int(path.name.removeprefix("step_"))) for path in found)
        raise UserError(f"step={step} is not among the complete checkpoints of {run}: choose one of {steps}")
    checkpoint.read_state(folder)
    return folder


def _restore(model_folder: Path, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with the checkpoint's weights, gathered from every rank's shards, at any ZeRO stage."""
    config = read_config(str(model_folder))
    # Built in its dtype rather than cast: a cast would round the rotary frequencies, which stay float32, too.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (model_folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(model_folder)
    weights = {name.removeprefix(WRAPPER): tensor for name, tensor in _gather(folder).items()}
    fill(model, weights, str(folder))
    return model


def _gather(folder: Path) -> dict[str, Any]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # gathering needs no device, and DeepSpeed warns when it finds none
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its own progress
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=checkpoint.ENGINE)
    assert weights is not None
    return dict(weights)
