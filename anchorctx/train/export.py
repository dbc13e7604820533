"""A run's checkpoint as a Hugging Face folder: weights, tokenizer, model card, a config with the new length and RoPE.

The folder loads with plain `AutoModelForCausalLM.from_pretrained`, on machines without this package. It is written
beside, loaded back, compared with the weights that were trained, and only then renamed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from anchorctx.errors import UserError
from anchorctx.models.load import fill, read_config, read_tokenizer
from anchorctx.models.save import save_model
from anchorctx.models.weights import untie
from anchorctx.parallel.dist import Ranks
from anchorctx.records.disk import Writing, need_space
from anchorctx.records.files import StagedFolder, write_bytes
from anchorctx.records.locks import sole_writer
from anchorctx.train import hub
from anchorctx.train.card import model_card
from anchorctx.train.checkpoints import compare, folders, read
from anchorctx.train.config import ExportConfig
from anchorctx.train.model_folder import MODEL, check_model_folder

ALONE = Ranks(0, 1, torch.device("cpu"))
LOST = "the export does not reproduce the checkpoint"
INTACT = "the run and its checkpoints are intact"
Weights = dict[str, torch.Tensor]


def export(config: ExportConfig) -> Path:
    """Write the Hugging Face folder, and push it where `push_to` asks for it; returns the folder.

    Raises:
        UserError: there is nothing to export, what the run keeps beside its weights was changed, the folder exists,
            another process writes it, or there is no room for it.
    """
    out, run = Path(config.out_dir), Path(config.run)
    with Writing("the export", out, intact=INTACT), sole_writer(out, "out_dir"):
        if out.exists():
            raise UserError(f"out_dir={out} exists already: remove it, or choose another")
        found = _checkpoint(run, config.step, config.trust)
        check_model_folder(run)
        if config.push_to is not None:
            hub.check(config.push_to)
        disable_progress_bar()  # avoid a second progress bar
        compare.check_exported(found.state, read_config(str(run / MODEL)), run / MODEL / "config.json", found.folder)
        model, trained = _restore(run / MODEL, gather(found), str(found.folder), getattr(torch, config.dtype.value))
        _write(model, trained, run, found, out)
    if config.push_to is not None:
        hub.push(out, config.push_to)
    return out


def _write(model: PreTrainedModel, trained: Weights, run: Path, found: read.Found, out: Path) -> None:
    """Write `out` from the checkpoint `found` of `run`; it appears when it is whole."""
    needed = _size(model)
    need_space(out, needed, "the export", INTACT)
    staged = StagedFolder(out, marker="config.json")
    with Writing("the export", out, needed, INTACT):
        try:
            save_model(model, staged.folder, read_tokenizer(str(run / MODEL)))
            verify_export(model, trained, staged.folder)
            card = model_card(run, found.state, model, out.name)
            write_bytes(staged.folder / "README.md", card.encode())
            staged.publish()
        finally:
            staged.discard()


def _size(model: PreTrainedModel) -> int:
    """Bytes of the weights on disk; those of a head that is tied to the embeddings are there once."""
    weights = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def verify_export(model: PreTrainedModel, trained: Weights, folder: Path, tokens: int = 64) -> None:
    """Load `folder` as a user would, and compare its logits on random tokens with those of the trained weights.

    Args:
        model: what was saved: gives the code, the configuration and the rounded frequencies, but no weight.
        trained: every weight of the checkpoint by its name in the model, in the folder's dtype. They take the places
            of the model's own one by one, a head also where the model ties it, so that a model which lost weights when
            it was built cannot be compared with itself.
        folder: what was written.
        tokens: length of the row of random ids.

    Raises:
        UserError: something was lost on the way; names the difference.
    """
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    ours, theirs = _positions(model), _positions(loaded)
    for name in ours:
        if ours[name] != theirs[name]:
            raise UserError(f"{LOST}: {name} is {theirs[name]}, not {ours[name]}; not written")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, tokens), generator=generator)
    with torch.no_grad():
        expected = torch.func.functional_call(model.eval(), trained, (ids,), tie_weights=False).logits
        found = loaded(ids).logits
    # Same dtype, same code, same machine: equal to the last bit, or something was lost on the way.
    if not torch.equal(expected, found):
        worst = (expected - found).abs().max().item()
        raise UserError(f"{LOST}: logits differ by up to {worst:.2e}; not written")


def _positions(model: PreTrainedModel) -> dict[str, Any]:
    """The settings of positions, of which a short row does not show all."""
    config = model.config.get_text_config()
    fields = {name: getattr(config, name, None) for name in ("rope_parameters", "max_position_embeddings")}
    # Phi 3 has rope_type under this name as well, if it was read from `rope_scaling`
    fields["rope_parameters"] = {k: v for k, v in (fields["rope_parameters"] or {}).items() if k != "type"}
    return fields


def _checkpoint(run: Path, step: int | None, trust: bool) -> read.Found:
    """The run's checkpoint, verified: the newest, or that of a step."""
    root = run / folders.CHECKPOINTS
    complete = folders.complete(root)
    if not complete:
        raise UserError(f"run={run} has no complete checkpoint: name the out_dir of a training run that wrote one")
    run_id = folders.run_id(run)
    if step is None:
        found = read.newest(complete, run=run_id, trust=trust, ranks=ALONE)
        assert found is not None
        if found.damaged:  # nobody who exports the newest weights means others
            raise UserError(
                f"{max(found.damaged)} is damaged: set step={found.state.step} to export {found.folder.name}, the "
                "newest that is intact"
            )
        return found
    folder = folders.step_folder(root, step)
    if folder not in complete:
        steps = ", ".join(str(folders.step_of(path)) for path in complete)
        raise UserError(f"step={step} is not among the complete checkpoints of {run}: choose one of {steps}")
    return read.verified(folder, run=run_id, trust=trust, ranks=ALONE)


def _restore(model_folder: Path, weights: Weights, source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Weights]:
    """The model with a checkpoint's weights; and these weights. Both in `dtype`, but for what it keeps in float32."""
    config = read_config(str(model_folder))
    untie(source, config, weights)  # of a run that took the contradiction over from what it was given
    # Built in its dtype rather than cast: a cast would round the rotary frequencies, which stay float32, too.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (model_folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(model_folder)
    needed = model.state_dict()
    for name in weights.keys() & needed.keys():
        weights[name] = weights[name].to(needed[name].dtype)
    fill(model, weights, source)
    return model, {name: weight for name, weight in weights.items() if name in needed}


def gather(found: read.Found) -> Weights:
    """All weights of a checkpoint, in float32 where they were trained, by their names in the model; tied ones twice."""
    weights = {name: found.shards.whole(name, shape) for name, shape in found.state.shapes.items()}
    return weights | {name: weights[stored] for name, stored in found.state.tied.items()}
