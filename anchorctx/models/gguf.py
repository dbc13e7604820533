"""Models in GGUF files, llama.cpp's format, as ordinary Hugging Face folders.

A file is converted once, into Hugging Face's cache of assets: first configuration and tokenizer, which is all that a
plan or a tokenizer's user needs, and the weights, dequantised to float32, when they are first loaded. So every command
meets a folder like any other. transformers and the package `gguf` do the reading; what they would read wrongly, and
without a word, is mended or refused here: scaled rotary frequencies, how digits are split, weights left over.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from anchorctx.errors import UserError
from anchorctx.models.gguf_tokenizer import convert_tokenizer
from anchorctx.records.files import StagedFolder, sampled_digest
from anchorctx.records.locks import sole_writer

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
FORMAT = 1
"""Of the folders that are made here: raise it when they change, so that older ones are made anew."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all Llama 3 models from 3.1 on have, beside the factor: 8 or 32."""


def is_gguf(path: str) -> bool:
    """Whether `path` names a GGUF file, here or on the hub."""
    return path.lower().endswith(SUFFIX)


def local_file(path: str) -> Path:
    """The file on this machine: as it is named, or downloaded, for OWNER/NAME/FILE.gguf of the hub; else UserError."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    parts = path.split("/")
    if path.startswith((".", "/", "~")) or len(parts) < 3:
        raise UserError(
            f"model {path} does not exist: name a GGUF file of this machine, or one of the hub as OWNER/NAME/FILE.gguf"
        )
    logger.info("there is no file %s here: looking for it on the hub", path)
    with _reading(path):
        return Path(huggingface_hub.hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))


def folder_of(path: str, *, weights: bool = False) -> Path:
    """The file as a Hugging Face folder, made now unless it is in the cache.

    Args:
        path: as for `local_file`.
        weights: with the weights too, in float32; without, there may be none.

    Raises:
        UserError: no such file, one that is damaged or cannot be read, or the package gguf is missing.
    """
    file = local_file(path)
    name = f"{file.stem}-{sampled_digest([file])}-{transformers.__version__}-{FORMAT}"
    folder = Path(constants.HF_ASSETS_CACHE, "anchorctx", "gguf", name)
    _make_once(folder, "config.json", lambda out: _describe(file, out))
    if not weights:
        return folder
    whole = folder.with_name(f"{name}-weights")  # another one: whoever reads the first must not see half a file
    _make_once(whole, "config.json", lambda out: _add_weights(file, folder, out))
    return whole


def _make_once(folder: Path, marker: str, write: Callable[[Path], None]) -> None:
    """Make `folder` by `write` unless it is there; of several processes one makes it and the others wait."""
    if (folder / marker).is_file():
        return
    with sole_writer(folder):
        if (folder / marker).is_file():
            return
        staged = StagedFolder(folder, marker)
        try:
            write(staged.folder)
            staged.publish()
        finally:
            staged.discard()


# -- what is in the file ----------------------------------------------------------------------------------------------


def _describe(file: Path, out: Path) -> None:
    """Write configuration and tokenizer into `out`; UserError for whatever will not load."""
    reader = _open(file)
    _check_quantisation(file, reader)
    with _reading(str(file)):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    _check_rope(file, reader, config)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    config.architectures = [kind.__name__] if kind else None
    with _reading(str(file)):
        read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = convert_tokenizer(file, reader, read)
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _open(file: Path) -> Any:
    """The package's `GGUFReader`, which maps the file into memory."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"model {file} needs the package gguf: pip install 'anchorctx[gguf]'") from None
    with file.open("rb") as opened:
        begins = opened.read(4)
    if begins != b"GGUF":
        raise UserError(f"model {file} is not a GGUF file, which begins with the letters GGUF: download it again")
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        kind = "has a quantisation" if "GGMLQuantizationType" in str(error) else "is cut short or damaged, or has parts"
        raise UserError(
            f"model {file} {kind} that the package gguf cannot read ({_first_line(error)}): download it again, or "
            "take a file of a common type such as Q4_K_M, Q8_0 or F16"
        ) from error


def _check_quantisation(file: Path, reader: Any) -> None:
    """Dequantise a row of each type: the package knows more types than it can dequantise."""
    import gguf

    for kind, tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.items():
        try:
            gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
        except NotImplementedError as error:
            raise UserError(
                f"model {file} has weights of the type {kind.name}, which the package gguf cannot dequantise: take a "
                "file of a common type such as Q4_K_M, Q8_0 or F16"
            ) from error


def _check_rope(file: Path, reader: Any, config: PretrainedConfig) -> None:
    """Take over the scaling of the rotary frequencies, which transformers leaves out; UserError for one unknown here.

    llama.cpp stores Llama 3's as a divisor for each frequency, others by name.
    """
    divisors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    field = reader.get_field(f"{text_field(reader, 'general.architecture')}.rope.scaling.type")
    kind = str(field.contents()) if field is not None else "none"
    long = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_factors")]
    if long or kind not in ("none", "linear"):
        raise UserError(
            f"model {file} scales its rotary frequencies ({long[0] if long else kind}) in a way that transformers does "
            "not read from a GGUF file: take the model as a Hugging Face folder"
        )
    if kind == "linear":
        factor = reader.get_field(f"{text_field(reader, 'general.architecture')}.rope.scaling.factor")
        config.rope_parameters |= {"rope_type": "linear", "factor": float(factor.contents())}
    if divisors is not None:
        _take_llama3(file, torch.from_numpy(divisors.copy()), config)


def _take_llama3(file: Path, divisors: torch.Tensor, config: PretrainedConfig) -> None:
    """Set Llama 3's scaling if it gives `divisors`, (head_dim / 2,) float32; else UserError."""
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 2 * len(divisors), 2) / (2 * len(divisors)))
    scaled = config.rope_parameters | LLAMA3 | {"rope_type": "llama3", "factor": float(divisors.max())}
    config.rope_parameters = scaled
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    # Both are float32 and were computed by different programs: equal to its precision, or another scaling.
    if not torch.allclose(plain / divisors, frequencies, rtol=1e-4, atol=0.0):
        raise UserError(
            f"model {file} scales its rotary frequencies in another way than Llama 3, which transformers does not read "
            "from a GGUF file: take the model as a Hugging Face folder"
        )


def text_field(reader: Any, name: str) -> str | None:
    """A string of the file's metadata; None where it has none of that name."""
    field = reader.get_field(name)
    return None if field is None else str(field.contents())


# -- weights ----------------------------------------------------------------------------------------------------------


def _add_weights(file: Path, folder: Path, out: Path) -> None:
    """Write the model of `file` into `out`, with the configuration and the tokenizer of `folder`."""
    logger.info("dequantising %s into %s, once", file, out.parent)
    config = AutoConfig.from_pretrained(folder)
    options: dict[str, Any] = {"gguf_file": file.name, "config": config, "dtype": torch.float32}
    # From transformers 5.24 on some architectures stay quantised otherwise, where there is a kernel.
    if (kind := getattr(transformers, "GgufConfig", None)) is not None:
        options["quantization_config"] = kind(dequantize=True)
    with _reading(str(file)):
        found: Any = AutoModelForCausalLM.from_pretrained(file.parent, output_loading_info=True, **options)
    model, info = found
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"model {file} lacks {len(missing)} weights of {type(model).__name__} (first: {missing[0]})")
    stored = sum(int(tensor.n_elements) for tensor in _open(file).tensors if not tensor.name.startswith("rope_"))
    taken = sum(parameter.numel() for parameter in model.parameters())
    if stored != taken:
        raise UserError(
            f"model {file} has {stored:,} numbers, of which transformers' {type(model).__name__} takes {taken:,}: it "
            "would compute something else; take the model as a Hugging Face folder"
        )
    model.hf_quantizer = None  # else it would not be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(out)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Make a library's error while reading `path` one sentence."""
    try:
        yield
    except Exception as error:  # anything from a KeyError for missing metadata to tokenizers' own, a plain Exception
        raise UserError(
            f"model {path} cannot be read by transformers ({_first_line(error)}): take the model as a Hugging Face "
            "folder, or an architecture that transformers reads from GGUF files, such as llama or qwen2"
        ) from error
