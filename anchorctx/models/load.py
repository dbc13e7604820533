"""The one reader of models on disk or on the hub: configuration, tokenizer, weights, and what is wrong with them.

Every command reads through here, so that a damaged checkpoint is refused in the same words by all of them. transformers
would draw missing weights, and those of another shape, at random.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import load_state_dict

from anchorctx.attention.rope import restore_frequencies
from anchorctx.errors import UserError
from anchorctx.models.generation import drop_unused
from anchorctx.models.gguf import folder_of, is_gguf
from anchorctx.models.settle import settle
from anchorctx.models.unreadable import unreadable
from anchorctx.models.weights import (
    check_files,
    check_finite,
    refuse_adapter,
    tied_pairs,
    untie,
    untie_by_files,
    weight_files,
)

logger = logging.getLogger(__name__)

OWN_CODE: dict[str, Any] = {"trust_remote_code": False}
"""transformers would ask on the terminal whether to run a repository's code; here none is run."""
COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
GENERATION_CONFIG_NAME = "generation_config.json"


def local_folder(path: str, *, weights: bool = False) -> Path | None:
    """The folder that `path` names, or None for a name on the hub; UserError for a folder that is no model.

    A GGUF file is made into one, its weights only where `weights` asks for them.
    """
    if is_gguf(path):
        return folder_of(path, weights=weights)
    folder = Path(path).expanduser()
    if not folder.exists():
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
        if looks_local:
            raise UserError(f"model {path} does not exist: name the folder of a Hugging Face model, or one on the hub")
        _report_hub(path)
        return None
    if folder.is_dir():
        check_files(path, folder)
    refuse_adapter(path, folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model {path} has no config.json, so it is not a Hugging Face model: name an exported folder "
            "(a DeepSpeed checkpoint becomes one with anchorctx export)"
        )
    return folder


@functools.cache  # once, though configuration, tokenizer and weights are read one after the other
def _report_hub(path: str) -> None:
    """Without a network the hub client tries for half a minute: say what it looks for."""
    logger.info("there is no folder %s here: looking for a model of that name on the hub", path)


def read_config(path: str, fields: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The model's configuration with some `fields` changed, in agreement with a folder's weights (`untie`).

    Raises:
        UserError: there is none, it has no field of that name, or the change is impossible.
    """
    folder = local_folder(path)
    with _reading(path):
        found: Any = AutoConfig.from_pretrained(folder or path, return_unused_kwargs=True, **OWN_CODE, **(fields or {}))
    config, unknown = found
    _check_counts(path, config.get_text_config() if not config.is_encoder_decoder else config)
    settle(config)
    for name in unknown:
        near = difflib.get_close_matches(name, config.to_dict(), 1)
        hint = f"did you mean {near[0]}?" if near else "its config.json lists what it has"
        raise UserError(f"config.{name}={unknown[name]} is not a field of {type(config).__name__}: {hint}")
    if folder is not None:
        with _reading(path):
            untie_by_files(path, folder, config)
    return config


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; UserError when there is none."""
    folder = local_folder(path)
    with _reading(path):
        return AutoTokenizer.from_pretrained(folder or path, **OWN_CODE)


def load_weights(path: str, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The causal language model with its weights.

    Under ZeRO 3 transformers hides unknown weights and wrong shapes: call `check_weights` before.

    Args:
        path: folder, or name on the hub.
        config: as from `read_config`.
        options: of transformers' `from_pretrained`: dtype, attn_implementation, device_map.

    Raises:
        UserError: nothing to read, or weights that are missing, not finite or of another shape; unknown ones are
            logged.
    """
    folder = local_folder(path, weights=True)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, with both shapes
    # a .bin is a pickle, which may run anything
    options |= OWN_CODE | {"weights_only": True} | _generation(path, folder)
    with _reading(path), _without_report():
        if folder is not None:
            weight_files(folder)  # says which of them is missing
        found: Any = AutoModelForCausalLM.from_pretrained(folder or path, config=config, **options)
    model, info = found
    if getattr(model, "_hf_peft_config_loaded", False):  # of the hub: a folder's is refused before
        raise UserError(f"model {path} is an adapter: merge it (peft's merge_and_unload), and name the result's folder")
    _judge(path, type(model), info)
    check_finite(path, model)
    untie(path, model.config, dict(model.named_parameters(remove_duplicate=False)))
    drop_unused(model.generation_config)
    restore_frequencies(model)
    return model


def check_weights(path: str, config: PretrainedConfig) -> None:
    """Compare a folder's weights with what the model needs, reading their names and shapes alone.

    Folders without weights and models of the hub pass: a plan needs no weights.

    Raises:
        UserError: as `load_weights`.
    """
    folder = local_folder(path)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if folder is None or kind is None or getattr(config, "quantization_config", None):
        return
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": "meta"}
    with _reading(path), _without_report():
        weights: dict[str, torch.Tensor] = {}
        for file in weight_files(folder):
            weights |= load_state_dict(file, map_location="meta")
        if not weights:
            return
        # On the meta device: names and shapes are compared, and no weight takes memory.
        _, info = kind.from_pretrained(None, config=config, state_dict=weights, **options)
    _judge(path, kind, info)


def _generation(path: str, folder: Path | None) -> dict[str, GenerationConfig]:
    """What to give from_pretrained where the folder's own contradicts itself, which must not stop anybody."""
    if folder is None or not (folder / GENERATION_CONFIG_NAME).is_file():
        return {}
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # OSError for no JSON, ValueError for what does not go together
        logger.warning("model %s: its %s is left out (%s)", path, GENERATION_CONFIG_NAME, reason(error, first=True))
        return {"generation_config": GenerationConfig()}
    return {}


def _check_counts(path: str, config: PretrainedConfig) -> None:
    """UserError for fewer than one of what every model has: transformers builds one without layers."""
    for name in COUNTS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise UserError(
                f"model {path} has {name}={value} in its config.json, where there is at least 1: correct it"
            )


def fill(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Make `weights`, named as in the model's own state and of its dtypes, the model's; tied ones may be missing.

    Raises:
        UserError: as `load_weights`, naming `source`.
    """
    needed = model.state_dict()
    # an embedding that is also the head is stored once, under either name
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    shapes = {(n, w.shape, needed[n].shape) for n, w in weights.items() if n in needed and w.shape != needed[n].shape}
    info = {
        "missing_keys": needed.keys() - weights.keys() - tied,
        "mismatched_keys": shapes,
        "unexpected_keys": weights.keys() - needed.keys(),
    }
    _judge(source, type(model), info)
    model.load_state_dict(weights, strict=False, assign=True)  # no second copy
    check_finite(source, model)
    model.tie_weights()


def reason(error: BaseException, *, first: bool = False) -> str:
    """One line of a library's error: its last, which is the cause, or its first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0 if first else -1].strip().rstrip(".:")


def _judge(path: str, model: type[PreTrainedModel], info: Mapping[str, Any]) -> None:
    """Refuse or report what transformers' loading information has."""
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    wrong, kind = sorted(info["mismatched_keys"]), model.__name__
    if missing:
        raise UserError(f"model {path} {_lacking(model, missing, unknown)}")
    if wrong:
        name, found, needed = wrong[0]
        if 0 in found and 0 not in needed:
            raise UserError(
                f"model {path} has {_counted(len(wrong))} without any number in it (first: {name}), as a run under "
                "ZeRO 3 leaves them that saves only its own share: gather them from its checkpoint (zero_to_fp32.py)"
            )
        raise UserError(
            f"model {path} has {_counted(len(wrong))} of another shape than its configuration asks for (first: {name} "
            f"is {tuple(found)}, {kind} needs {tuple(needed)}): undo changes of the configuration, or download or "
            "export it again"
        )
    if unknown:
        _report_unknown(path, kind, len(unknown), unknown[0])


def _lacking(model: type[PreTrainedModel], missing: list[str], unknown: list[str]) -> str:
    """What is wrong with a folder that lacks weights of `model` and has others, and what to do about it."""
    kind, absent = model.__name__, set(missing)
    for name in unknown:
        rest = name
        while rest := rest.partition(".")[2]:  # module.lm_head.weight: lm_head.weight, then weight
            if rest in absent:
                return (
                    f"has {name.removesuffix(rest)} in front of the names of its weights (such as {name}), which "
                    f"{kind} does not have: remove it from the names and save them again"
                )
    if absent <= set(tied_pairs(model)):
        others = f", but {unknown[0]}" if unknown else ""
        return (
            f"has no {missing[0]}{others}: name a causal language model, not a base model or a classifier, or set "
            "tie_word_embeddings to true in its config.json if its embedding is its head"
        )
    return (
        f"lacks {_counted(len(missing))} of {kind} (first: {missing[0]}): download or export it again, or name a "
        "complete causal language model"
    )


@functools.cache  # once, though a command may look at the headers first and read the weights later
def _report_unknown(path: str, kind: str, count: int, first: str) -> None:
    logger.warning("model %s has %s that %s does not know (first: %s), left out", path, _counted(count), kind, first)


def _counted(count: int) -> str:
    return "1 weight" if count == 1 else f"{count} weights"


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Make a library's error while reading `path` one sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, UserError):
        raise
    except Exception as error:  # of a KeyError for an unknown scaling to tokenizers' own, a plain Exception
        raise unreadable(path, error) from error


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Leave out transformers' table of weights that do not fit: `_judge` has the same in a sentence."""
    source = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source.addFilter(keep)
    try:
        yield
    finally:
        source.removeFilter(keep)
