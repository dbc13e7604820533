"""What is written here as others read it: transformers 4 and what builds on it, other users of the machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from anchorctx.layout import PackedLayout
from anchorctx.models import ModelConfig, RopeConfig, RopeType, load_model, save_model
from anchorctx.models.generation import drop_unused
from anchorctx.testing.tiny import ARCHITECTURES, Architecture, word_tokenizer

YARN = RopeConfig(type=RopeType.yarn, factor=4.0, theta=5e5)
LINEAR = RopeConfig(type=RopeType.linear, factor=2.0)
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0] * 4}
MODELS = ARCHITECTURES | {
    "phi3_longrope": Architecture("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128})
}


def written(name: str, folder: Path, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
    """config.json of an architecture's tiny model."""
    save_model(MODELS[name].build(attention="reference", **options), folder, tokenizer)
    return json.loads((folder / "config.json").read_text())


# vllm-project/vllm #42624, Open-Athena/MarinFold #184, THUDM/slime #1720: theta 1e4 and no scaling, in silence
@pytest.mark.parametrize(
    ("name", "rope", "older"),
    [
        ("llama", RopeConfig(theta=1e6), {"rope_theta": 1e6, "rope_scaling": None}),
        (
            "qwen3",
            YARN,
            {
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            },
        ),
        (
            "phi3_longrope",
            RopeConfig(),
            {
                "rope_theta": 1e4,
                "original_max_position_embeddings": 128,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0] * 4},
            },
        ),
        ("gpt_neox", RopeConfig(theta=2e4), {"rotary_emb_base": 2e4, "rotary_pct": 0.25, "rope_scaling": None}),
        ("gemma3", RopeConfig(theta=5e6), {"rope_theta": 5e6, "rope_local_base_freq": 1e4, "rope_scaling": None}),
        (
            "olmo3",
            LINEAR,
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
    ],
)
def test_rope_settings_also_under_their_older_names(
    name: str, rope: RopeConfig, older: dict[str, Any], tmp_path: Path
) -> None:
    fields = written(name, tmp_path, rope=rope)
    assert {key: fields[key] for key in older} == older
    # and transformers 5 reads its own, with an alias of rope_type in Phi 3
    read = AutoConfig.from_pretrained(tmp_path).rope_parameters
    read.pop("type", None)
    assert read == fields["rope_parameters"]


# as above, of settings that no older name can say
@pytest.mark.parametrize(
    ("name", "options", "untold"),
    [
        ("olmo3", {"rope": RopeConfig(theta=1e6)}, "another theta of the sliding-window layers"),
        ("llama", {"rope": YARN, "max_length": 1000}, "YaRN's factor, 4, apart from the maximum length, 1000"),
    ],
)
def test_what_transformers_4_cannot_be_told_is_said(
    name: str, options: dict[str, Any], untold: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(name, tmp_path, **options)
    assert f"transformers 4 would read this model wrongly, for it does not know {untold}" in caplog.text


# jingyaogong/minimind #578, unslothai/unsloth #8444: a class that transformers 4 does not know
def test_a_tokenizer_class_that_both_know(tmp_path: Path) -> None:
    written("llama", tmp_path, word_tokenizer(96))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path)("w5 w6").input_ids == [5, 6]


# ml-explore/mlx-lm #661, modelscope/ms-swift #8352: a list where transformers 4 has a dictionary
def test_further_special_tokens_under_a_name_that_both_know(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(90)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    written("llama", tmp_path, tokenizer)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in fields and len(fields["additional_special_tokens"]) == 2
    back = AutoTokenizer.from_pretrained(tmp_path)
    assert back("<|im_end|> w5").input_ids == tokenizer("<|im_end|> w5").input_ids == [91, 5]
    assert back.decode([90, 5, 91], skip_special_tokens=True).strip() == "w5"


# vllm-project/vllm: the tokenizer's length wins over the model's where it is less
@pytest.mark.parametrize(("before", "after"), [(128, 2048), (4096, 4096), (int(1e30), int(1e30))])
def test_the_tokenizer_is_as_long_as_the_model(before: int, after: int, tmp_path: Path) -> None:
    tokenizer = word_tokenizer(96)
    tokenizer.model_max_length = before
    written("llama", tmp_path, tokenizer, rope=YARN)  # 4 x 512
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == after
    assert tokenizer.model_max_length == before


# safetensors/safetensors #782, huggingface/sentence-transformers #4010: weights that nobody else may read
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_files_are_readable_by_whom_the_umask_allows(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        written("llama", tmp_path / "out", word_tokenizer(96))
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


# haotian-liu/LLaVA #1635, hiyouga/LlamaFactory #2545, huggingface/transformers #29988: Llama 2's and Vicuna's settings,
# which can be read and not written by transformers 4 and 5.17
def test_settings_of_sampling_without_sampling_are_left_out(tmp_path: Path) -> None:
    written("llama", tmp_path / "base", word_tokenizer(96))
    published = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "length_penalty": 2.0, "max_length": 4096}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(published))
    save_model(load_model(ModelConfig(path=str(tmp_path / "base"))), tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    fields.pop("transformers_version")
    assert fields == {"do_sample": False, "max_length": 4096}
    # what is in use stays
    sampling = GenerationConfig(do_sample=True, temperature=0.6, num_beams=4, length_penalty=2.0)
    before = sampling.to_dict()
    drop_unused(sampling)
    assert sampling.to_dict() == before


# -- transformers 4 itself ------------------------------------------------------------------------------------------


READ = """
import json, pathlib, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.")
found = {}
for folder in map(pathlib.Path, sys.argv[1:]):
    expected = torch.load(folder / "expected.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found[folder.name] = {
        "deviation": (logits - expected["logits"]).abs().max().item(),
        "ids": tokenizer("w5 <|im_end|> w6").input_ids,
        "length": tokenizer.model_max_length,
        "generated": model.generate(expected["ids"][:, :4], max_new_tokens=2, do_sample=False).shape[1],
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def transformers_4(pytestconfig: pytest.Config) -> dict[str, str]:
    """Environment variables of a Python with transformers 4, made once and kept in pytest's cache."""
    assert pytestconfig.cache is not None
    site = pytestconfig.cache.mkdir("transformers_4")
    packages = ["transformers==4.57.*", "huggingface_hub<1", "tokenizers<=0.23.0"]
    if not (site / "transformers").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *packages]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr or done.stdout or "no reason given").strip().splitlines()[-1]
            pytest.skip(f"pip cannot install {packages[0]} here: {why}")
    return os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


# all of the above, by the reader itself
@pytest.mark.slow
def test_transformers_4_computes_the_same(transformers_4: dict[str, str], tmp_path: Path) -> None:
    models = {name: (name, {}) for name in MODELS}
    models |= {f"{name}_theta": (name, {"rope": RopeConfig(theta=1e6)}) for name in ("llama", "gpt_neox", "gemma3")}
    models |= {
        f"llama_{kind.value}": ("llama", {"rope": RopeConfig(type=kind, factor=4.0)})
        for kind in RopeType
        if kind is not RopeType.default
    }
    models["olmo3_yarn"] = ("olmo3", {"rope": RopeConfig(type=RopeType.yarn, factor=4.0)})
    models["gemma3_linear"] = ("gemma3", {"rope": RopeConfig(type=RopeType.linear, factor=4.0)})
    tokenizer = word_tokenizer(90)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    ids = torch.randint(3, 90, (1, 48), generator=torch.Generator().manual_seed(0))
    folders = []
    for label, (name, options) in models.items():
        model = MODELS[name].build(attention="reference", **options).eval()
        save_model(model, folder := tmp_path / label, tokenizer)
        with torch.no_grad():
            logits = model(ids, use_cache=False, layouts=(PackedLayout((0, 48)),)).logits
        torch.save({"ids": ids, "logits": logits}, folder / "expected.pt")
        folders.append(str(folder))
    bare = shutil.copytree(tmp_path / "llama_theta", tmp_path / "bare")  # as transformers 5 writes it
    fields = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({key: fields[key] for key in fields if key != "rope_theta"}))
    command = [sys.executable, "-c", READ, *folders, str(bare)]
    done = subprocess.run(command, capture_output=True, text=True, env=transformers_4)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("bare")["deviation"] > 1  # 3.1 measured: what the older names are for
    assert found.keys() == models.keys()
    for label, reading in found.items():
        assert reading["deviation"] < 1e-6, label  # 0 measured, for all
        assert reading["ids"] == [5, 91, 6] and reading["generated"] == 6
        assert reading["length"] >= 512
