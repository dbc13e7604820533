"""Checkpoints that are broken or unusual: each is refused in one sentence that names what is wrong, or read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anchorctx.errors import UserError
from anchorctx.models import ModelConfig, load_model
from anchorctx.models.load import check_weights, load_weights, read_config, read_tokenizer
from anchorctx.testing.tiny import ARCHITECTURES

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 4976698672\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    ARCHITECTURES["llama"].build().save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 96)}
    rules = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def read(folder: Path) -> None:
    """As every command does, the weights' names first."""
    path = str(folder)
    config = read_config(path)
    read_tokenizer(path)
    check_weights(path, config)
    load_weights(path, config, dtype=torch.float32)


def edit(name: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def config(**fields: Any) -> Callable[[Path], None]:
    return edit("config.json", **fields)


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_text(text))


def cut(size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return change


def as_bin(content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_text(content)

    return change


def as_shards(index: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(index)

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def void(_: object) -> None: ...


OWN = {"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "modeling_my.My"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4}
CUT = "has a model.safetensors that is cut short or damaged .*: download or export it again"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    # huggingface/transformers #27923, microsoft/OmniParser #34, codefuse-ai/MFTCoder #20: cloned without git-lfs
    "pointer": (write("model.safetensors", POINTER), "pointer of git-lfs as model.safetensors: fetch it with git lfs"),
    "pointer_bin": (as_bin(POINTER), "a pointer of git-lfs as pytorch_model.bin"),
    "pointer_tokenizer": (write("tokenizer.json", POINTER), "a pointer of git-lfs as tokenizer.json"),
    # datalab-to/marker #970, PaddlePaddle/PaddleFormers #2435, mindverse/Second-Me #105: a download that was cut off
    "half": (cut(30_000), CUT),
    "header": (cut(200), CUT),
    "four_bytes": (cut(4), CUT),
    "empty": (cut(0), CUT),
    # huggingface/transformers #16479, huggingface/peft #2415, unslothai/unsloth #237: another vocabulary in the config
    "vocabulary_larger": (config(vocab_size=128), r"2 weights of another shape .*\(96, 32\).* needs \(128, 32\)"),
    "vocabulary_smaller": (config(vocab_size=50), r"2 weights of another shape .*\(96, 32\).* needs \(50, 32\)"),
    # unslothai/unsloth #39, hiyouga/LlamaFactory #939, huggingface/transformers #26695: quantised checkpoints
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), r"is quantised \(gptq\) .*16 or 32 bits"),
    "awq": (config(quantization_config={"quant_method": "awq", "bits": 4}), r"is quantised \(awq\)"),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"is quantised \(bitsandbytes\)",
    ),
    # huggingface/text-generation-inference #2172, Leeroo-AI/mergoo #21, OpenNMT/CTranslate2 #1685: Phi-3's old name
    "su": (
        config(rope_parameters={"type": "su", "rope_theta": 1e4, "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}),
        "RoPE type 'su', which transformers .* does not know: its name is longrope now",
    ),
    "scaling": (config(rope_parameters={"rope_type": "foo", "rope_theta": 1e4}), "RoPE type 'foo', which"),
    # huggingface/transformers #36877, deepseek-ai/DeepSeek-R1 #684: keys of YaRN that are missing or of another type
    "yarn_without_factor": (config(rope_parameters=YARN), "Missing required keys.*factor"),
    "yarn_factor_in_quotes": (config(rope_parameters=YARN | {"factor": "4"}), "cannot be loaded"),
    "rope_list": (config(rope_parameters=[1, 2]), "rope_parameters"),
    # huggingface/transformers #27499: configurations without a length
    "length_null": (config(max_position_embeddings=None), "max_position_embeddings.*got NoneType"),
    "hidden_size_in_quotes": (config(hidden_size="32"), "hidden_size.*expected int, got str"),
    "layers_null": (config(num_hidden_layers=None), "num_hidden_layers"),
    "layers_negative": (config(num_hidden_layers=-1), "num_hidden_layers=-1 .*at least 1"),
    "heads": (config(num_attention_heads=5), "not a multiple of the number of attention heads"),
    "no_heads": (config(num_attention_heads=0), "cannot be loaded"),
    "activation": (config(hidden_act="swish9"), "KeyError: 'swish9'"),
    "dtype": (config(dtype="float17"), "float17"),
    "padding": (config(pad_token_id=5000), "Padding_idx must be within"),
    # zai-org/ChatGLM3 #826, erfanzar/EasyDeL #94, lm-sys/FastChat #2713: a prompt that nobody answers
    "own_code": (config(model_type="mine", auto_map=OWN), "needs code of its own .* not run here"),
    "unknown_type": (config(model_type="mine"), "is of an architecture that transformers .* does not know"),
    "no_config": (write("config.json", "{"), "config.json that is no JSON"),
    "config_list": (write("config.json", "[1]"), "cannot be loaded"),
    "tokenizer_json": (write("tokenizer.json", "{"), "tokenizer.json that is no JSON"),
    "index_json": (as_shards("{"), "model.safetensors.index.json that is no JSON"),
    "index_list": (as_shards('{"weight_map": [1]}'), "cannot be loaded"),
    "no_tokenizer": (
        lambda folder: void([without(name)(folder) for name in ("tokenizer.json", "tokenizer_config.json")]),
        "Couldn't instantiate the backend tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_in_one_sentence(name: str, folder: Path) -> None:
    change, sentence = BROKEN[name]
    change(folder)
    with pytest.raises(UserError, match=sentence) as refused:
        read(folder)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


USUAL: dict[str, Callable[[Path], None]] = {
    "as_it_is": void,
    # huggingface/transformers #29988, haotian-liu/LLaVA #1144, OpenRLHF/OpenRLHF #212: sampling without do_sample
    "temperature": write("generation_config.json", '{"temperature": 0.6, "top_p": 0.9, "do_sample": false}'),
    # QwenLM/Qwen3-ASR #210, modelscope/ms-swift #1943: settings that transformers refuses to write, or to read
    "generation_contradicts": write("generation_config.json", '{"num_beams": 0, "num_return_sequences": 5}'),
    "generation_no_json": write("generation_config.json", "{"),
    "ends": config(eos_token_id=[1, 2]),
    # Llama 3's configurations name code that transformers has by now: its own is used, and nobody is asked
    "code_that_is_not_needed": config(auto_map=OWN),
    # huggingface/tokenizers #261, #168, #351: an unknown token that the vocabulary does not have
    "unknown_token": edit("tokenizer_config.json", unk_token="<zzz>"),
    "own_tokenizer_class": edit("tokenizer_config.json", tokenizer_class="NoSuchTokenizer"),
}


@pytest.mark.parametrize("name", USUAL)
def test_what_is_only_unusual_is_read(name: str, folder: Path, whole: Path) -> None:
    USUAL[name](folder)
    read(folder)
    found, expected = (load_model(ModelConfig(path=str(path))).state_dict() for path in (folder, whole))
    assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in expected)


def test_a_quantised_checkpoint_is_not_trained_even_where_it_can_be_read(folder: Path) -> None:
    """bitsandbytes-foundation/bitsandbytes #737, huggingface/transformers #26248, unslothai/unsloth #1110."""
    config(quantization_config={"quant_method": "fp8"})(folder)
    with pytest.raises(UserError, match=r"is quantised \(fp8\), and cannot be trained: .*16 or 32 bits"):
        load_model(ModelConfig(path=str(folder)))
