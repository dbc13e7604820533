"""A model's folder by its weights: which files hold them, and whether its configuration is right about the head."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from anchorctx.errors import UserError

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
POINTER = b"version https://git-lfs"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuse_adapter(path: str, folder: Path) -> None:
    """UserError for a folder that holds an adapter, with or without a model beside it.

    transformers would load it in silence where peft is installed, and leave it out in silence where it is not.
    """
    if (folder / ADAPTER).is_file():
        base = json.loads((folder / ADAPTER).read_text()).get("base_model_name_or_path") or "another model"
        raise UserError(
            f"model {path} holds an adapter of {base}: merge it into that model (peft's merge_and_unload), save the "
            "result and name its folder"
        )


def check_files(path: str, folder: Path) -> None:
    """UserError for a folder with a pipe or device in it, which would be waited for, or a pointer of git-lfs."""
    for file in sorted(folder.iterdir()):
        if not (file.is_file() or file.is_dir() or file.is_symlink()):
            raise UserError(f"model {path} has {file.name}, which is no file but a pipe, socket or device: remove it")
        if file.suffix in (".safetensors", ".bin", ".model", ".json") and file.is_file():
            with file.open("rb") as content:
                if content.read(len(POINTER)) == POINTER:
                    raise UserError(f"model {path} has a pointer of git-lfs as {file.name}: fetch it with git lfs pull")


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load, in its order of preference; none where there are no weights.

    Raises:
        UserError: the index names files that are not there.
    """
    for name, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index).is_file():
            shards = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            if outside := [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts]:
                raise UserError(f"{folder / index} names {outside[0]}, outside its folder: download the model again")
            if absent := [shard for shard in shards if not (folder / shard).is_file()]:
                raise UserError(
                    f"model {folder} lacks {len(absent)} of its {len(shards)} files of weights (first: {absent[0]}): "
                    "download or export it again"
                )
            return [folder / shard for shard in shards]
    return []


def check_finite(path: str, model: PreTrainedModel) -> None:
    """UserError for weights that are NaN or infinite: whatever is measured of such a model, or trained from it, is NaN.

    One pass over what this process holds, 0.3 ns a weight on a CPU; packed integers and weights elsewhere are passed.
    """
    for name, parameter in model.named_parameters():
        weight = getattr(parameter, "ds_tensor", parameter)  # its share, under ZeRO 3
        if weight.dtype not in FLOATS or weight.is_meta or not weight.numel():
            continue
        if not all(end.isfinite() for end in torch.aminmax(weight.detach())):  # both are NaN where any weight is
            count = int((~weight.isfinite()).sum())
            raise UserError(
                f"model {path} has weights that are NaN or infinite ({count:,} of {weight.numel():,} in {name}): its "
                "training went wrong or the file is damaged, so take an earlier checkpoint, or download it again"
            )


def tied_pairs(model: type[PreTrainedModel] | None) -> dict[str, str]:
    """The weights that `tie_word_embeddings` makes one in a transformers class: names of the head and the embedding."""
    pairs: Any = getattr(model, "_tied_weights_keys", None)
    return dict(pairs) if isinstance(pairs, dict) else {}


def untie_by_files(path: str, folder: Path, config: PretrainedConfig) -> None:
    """`untie` by what the folder's files hold; of the weights only a head and its embedding are read."""
    if not getattr(config, "tie_word_embeddings", False) or getattr(config, "quantization_config", None):
        return
    held = {name: file for file in weight_files(folder) for name in load_state_dict(str(file), map_location="meta")}
    called = {name: _called(name, held) for pair in tied_pairs(_class_of(config)).items() for name in pair}
    weights = {}
    for name, stored in called.items():
        if stored is None:  # a folder that agrees with its configuration holds one of the two
            return
        weights[name] = load_state_dict(str(held[stored]), map_location="cpu")[stored]  # mapped, not read
    untie(path, config, weights)


def untie(path: str, config: PretrainedConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Write `tie_word_embeddings=False` into a configuration that contradicts the weights, and say so.

    Merged adapters leave such folders: the head was trained apart from the embedding, but config.json calls the two
    one. transformers loads both; whoever builds a model from the configuration (ZeRO 3, an export) would lose the head.

    Args:
        path: names the model in the log.
        config: changed in place.
        weights: by their names in the model; a head or embedding that is not among them is tied as it says.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return
    for head, embedding in tied_pairs(_class_of(config)).items():
        if {head, embedding} <= weights.keys() and not _same(weights[head], weights[embedding]):
            config.tie_word_embeddings = False
            _report_untied(path, head, embedding)


@functools.cache  # once, though a command may read the configuration several times
def _report_untied(path: str, head: str, embedding: str) -> None:
    logger.warning(
        "model %s has tie_word_embeddings=true in its configuration, but %s and %s differ: both are kept, as with "
        "tie_word_embeddings=false",
        path,
        head,
        embedding,
    )


def _class_of(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return kind


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() or (
        first.shape == second.shape and torch.equal(first, second.to(first.dtype))
    )


def _called(name: str, held: Mapping[str, Path]) -> str | None:
    """What the files call a weight of the model; None where they have none.

    In a base model's file its names lack the model's prefix, in a multimodal one's they have another before them.
    """
    # model.embed_tokens.weight: embed_tokens.weight, or language_model.model.embed_tokens.weight
    names = [name, name.partition(".")[2], *(called for called in held if called.endswith(f".{name}"))]
    return next((called for called in names if called in held), None)
