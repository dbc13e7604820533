from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from anchorctx.attention import BACKENDS
from anchorctx.attention.config import RopeDtype
from anchorctx.attention.interface import implementation
from anchorctx.attention.rope import rotary_modules
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.models import (
    ModelConfig,
    ModelDtype,
    RopeConfig,
    RopeType,
    build_config,
    check_attention,
    check_length,
    check_vocabulary,
    load_model,
    reach,
    save_model,
)
from anchorctx.testing.numerics import observed_rope_dtype
from anchorctx.testing.tiny import ARCHITECTURES, BASE

LLAMA = {"model_type": "llama"} | BASE
LAYOUT = (PackedLayout((0, 1, 7, 12), 1),)
IDS = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_model(ARCHITECTURES["llama"].build(), path)
    return path


@pytest.fixture(scope="module")
def gemma3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma3")
    save_model(ARCHITECTURES["gemma3"].build(), path)
    return path


def logits(model: torch.nn.Module, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, position_ids=LAYOUT[0].position_ids()[None], use_cache=False, **kwargs).logits


def test_new_models_depend_on_the_seed_alone() -> None:
    states, draws = [], []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        states.append(load_model(ModelConfig(config=LLAMA, seed=seed)).lm_head.weight)
        draws.append(torch.rand(()).item())  # the global state is left as it was
    torch.manual_seed(1)
    assert draws[0] == draws[2] == torch.rand(()).item() != draws[1]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_folder_loads_with_its_weights_vocabulary_and_dtype(folder: Path) -> None:
    model = load_model(ModelConfig(path=str(folder)))
    assert model.training and model.dtype is torch.float32 and model.config.vocab_size == 96
    assert model.config._attn_implementation == "anchor" and observed_rope_dtype(model) is RopeDtype.float32
    for one, other in zip(model.parameters(), ARCHITECTURES["llama"].build().parameters(), strict=True):
        assert torch.equal(one, other)
    half = load_model(ModelConfig(path=str(folder), dtype=ModelDtype.bfloat16, rope_dtype=RopeDtype.bfloat16))
    assert half.dtype is torch.bfloat16 and observed_rope_dtype(half) is RopeDtype.bfloat16
    assert rotary_modules(half)[0].inv_freq.dtype is torch.float32


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_the_backend_is_the_one_asked_for(folder: Path, backend: str) -> None:
    """transformers must take every name for what it is: any with `flash` in it means a kernel of the hub to it."""
    model = load_model(ModelConfig(path=str(folder), attention=backend))
    assert model.config._attn_implementation == implementation(backend)


def test_a_backend_that_is_none(folder: Path) -> None:
    with pytest.raises(UserError, match="model.attention=fast is unknown: choose auto, flash_attn"):
        load_model(ModelConfig(path=str(folder), attention="fast"))


# -- RoPE ------------------------------------------------------------------------------------------------------------


def rope_cases() -> list[tuple[str, RopeConfig, int | None, dict, int]]:
    """Name, settings, max_length -> transformers' parameters and max_position_embeddings; the checkpoint has 512."""
    scaled = {"factor": 4.0, "rope_theta": 10000.0}
    return [
        ("theta", RopeConfig(theta=1e6), 4096, {"rope_type": "default", "rope_theta": 1e6}, 4096),
        ("linear", RopeConfig(type=RopeType.linear, factor=4.0), None, scaled | {"rope_type": "linear"}, 2048),
        ("dynamic", RopeConfig(type=RopeType.dynamic, factor=4.0), 2048, scaled | {"rope_type": "dynamic"}, 512),
        (
            "yarn",
            RopeConfig(type=RopeType.yarn, factor=4.0, theta=5e5, extra={"beta_fast": 16.0}),
            1024,
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "beta_fast": 16.0}
            | {"original_max_position_embeddings": 512},
            1024,
        ),
        (
            "llama3",
            RopeConfig(type=RopeType.llama3, factor=8.0, original_max_position_embeddings=256),
            8192,
            {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": 256}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            8192,
        ),
    ]


@pytest.mark.parametrize(("name", "rope", "max_length", "parameters", "positions"), rope_cases())
def test_rope_settings_reach_model_and_export(
    name: str, rope: RopeConfig, max_length: int | None, parameters: dict, positions: int, folder: Path, tmp_path: Path
) -> None:
    model = load_model(ModelConfig(path=str(folder), rope=rope, max_length=max_length))
    assert model.config.rope_parameters == parameters and model.config.max_position_embeddings == positions
    save_model(model, tmp_path)
    exported = json.loads((tmp_path / "config.json").read_text())
    assert exported["rope_parameters"] == parameters and exported["max_position_embeddings"] == positions
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(rotary_modules(plain)[0].inv_freq, rotary_modules(model)[0].inv_freq)
    fresh = rotary_modules(load_model(ModelConfig(path=str(folder))))[0]
    assert torch.equal(fresh.inv_freq, rotary_modules(model)[0].inv_freq) == (name == "dynamic")
    if name == "dynamic":  # its frequencies change with the row's length, beyond the original one
        module = rotary_modules(model)[0]
        module(torch.zeros(1), torch.arange(2048)[None])
        assert module.inv_freq[1] < fresh.inv_freq[1]


def test_settings_per_layer_type(gemma3_folder: Path) -> None:
    rope = RopeConfig(theta=5e6, extra={"sliding_attention": {"rope_theta": 2e4}})
    model = load_model(ModelConfig(path=str(gemma3_folder), rope=rope, max_length=4096))
    assert model.config.rope_parameters["full_attention"]["rope_theta"] == 5e6
    assert model.config.rope_parameters["sliding_attention"]["rope_theta"] == 2e4
    scaled = RopeConfig(type=RopeType.yarn, factor=8.0)
    config = build_config(ModelConfig(path=str(gemma3_folder), rope=scaled))
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default" and reach(config) == 4096


def test_partial_rotary_factor_is_kept(tmp_path: Path) -> None:
    save_model(ARCHITECTURES["gpt_neox"].build(), tmp_path)
    before = build_config(ModelConfig(path=str(tmp_path))).rope_parameters["partial_rotary_factor"]
    rope = RopeConfig(type=RopeType.yarn, factor=4.0, original_max_position_embeddings=500)
    model = load_model(ModelConfig(path=str(tmp_path), rope=rope))
    assert model.config.rope_parameters["partial_rotary_factor"] == before < 1 and reach(model.config) == 2000
    assert torch.isfinite(logits(model, layouts=LAYOUT)).all()


def test_an_original_length_outside_the_rope_parameters_is_written_too(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"original_max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rope = RopeConfig(type=RopeType.yarn, factor=4.0, original_max_position_embeddings=500)
    found = build_config(ModelConfig(path=str(tmp_path), rope=rope))
    assert found.rope_parameters["original_max_position_embeddings"] == 500 == found.original_max_position_embeddings


def test_a_scaling_that_the_architecture_does_not_take(tmp_path: Path) -> None:
    save_model(ARCHITECTURES["phi3"].build(), tmp_path)
    with pytest.raises(UserError, match="phi3 does not take these model.rope settings: .*longrope"):
        build_config(ModelConfig(path=str(tmp_path), rope=RopeConfig(type=RopeType.yarn, factor=4.0)))
    found = build_config(ModelConfig(path=str(tmp_path), rope=RopeConfig(theta=1e6)))
    assert found.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("rope", "max_length", "message"),
    [
        (RopeConfig(), 4096, "max_length=4096 exceeds the 512 positions.*set model.rope.theta"),
        (RopeConfig(type=RopeType.yarn), None, "rope.type=yarn needs model.rope.factor"),
        (RopeConfig(factor=2.0), None, "rope.factor=2.0 needs model.rope.type"),
        (RopeConfig(type=RopeType.default, factor=2.0), None, "has no effect with model.rope.type=default"),
        (RopeConfig(type=RopeType.linear, factor=2.0), 4096, "exceeds the 1024 .*raise model.rope.factor to 8"),
        (RopeConfig(theta=-1.0), None, "rope.theta=-1.0 must be at least 1"),
        (RopeConfig(type=RopeType.yarn, factor=0.5), None, "rope.factor=0.5 must be at least 1"),
        (RopeConfig(extra={"sliding_attention": {"rope_theta": 1.0}}), None, "no RoPE settings for layers"),
    ],
)
def test_contradicting_rope_settings(rope: RopeConfig, max_length: int | None, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        build_config(ModelConfig(path=str(folder), rope=rope, max_length=max_length))


def test_row_length_within_reach(folder: Path) -> None:
    config = build_config(ModelConfig(path=str(folder)))
    check_length(config, 512)
    with pytest.raises(UserError, match="row length 513 exceeds the 512 positions.*raise model.max_length"):
        check_length(config, 513)
    dynamic = RopeConfig(type=RopeType.dynamic, factor=4.0)
    check_length(build_config(ModelConfig(path=str(folder), rope=dynamic)), 2048)
    with pytest.raises(UserError, match="exceeds the 2048"):
        check_length(build_config(ModelConfig(path=str(folder), rope=dynamic)), 2049)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_exactly_one_source() -> None:
    for config in (ModelConfig(), ModelConfig(path="x", config=LLAMA)):
        with pytest.raises(UserError, match="exactly one of model.path"):
            load_model(config)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_folder(path: str) -> None:
    with pytest.raises(UserError, match=f"model {path} does not exist"):
        load_model(ModelConfig(path=path))


def test_a_hub_name_without_network_and_a_folder_without_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in ("someone/a-model", "nowhere"):
        with pytest.raises(UserError, match=f"model {path} cannot be loaded .*: name a folder with a model") as error:
            load_model(ModelConfig(path=path))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"model {tmp_path} has no config.json, so it is not a Hugging Face model"):
        load_model(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 8}, "needs model_type"),
        ({"model_type": "lama"}, "model_type=lama is unknown"),
        (LLAMA | {"num_layers": 2}, "num_layers is not a field of llama: did you mean num_hidden_layers"),
        ({"model_type": "gpt2"}, "gpt2 has no rotary"),
        (LLAMA | {"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        (LLAMA | {"hidden_size": 34}, r"hidden_size=34 must be a multiple of num_attention_heads=4: change one"),
        (
            {"model_type": "gpt_neox", "hidden_size": 34, "num_attention_heads": 4},
            "hidden_size=34 must be a multiple of num_attention_heads=4",
        ),
        (LLAMA | {"hidden_size": "wide"}, "not a valid llama configuration: .*hidden_size|wide"),
        ({"model_type": "qwen3_next", "num_hidden_layers": 4}, "qwen3_next has linear_attention layers"),
        ({"model_type": "bart"}, "bart has an encoder"),
        ({"model_type": "rwkv"}, "rwkv carries a state over the row"),
        ({"model_type": "gpt_neox_japanese"}, "gpt_neox_japanese computes attention by itself"),
    ],
)
def test_configurations_that_cannot_be_used(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(ModelConfig(config=fields))


def test_a_checkpoint_without_rope_or_with_missing_weights(tmp_path: Path, folder: Path) -> None:
    GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gpt2 has no rotary"):
        load_model(ModelConfig(path=str(tmp_path)))
    model = load_model(ModelConfig(path=str(folder)))
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(UserError, match="lacks 3 weights of LlamaForCausalLM"):
        load_model(ModelConfig(path=str(tmp_path / "part")))


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({f"t{i}": i for i in range(size)}, "t0")))


def test_a_tokenizer_beyond_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    model = load_model(ModelConfig(path=str(folder)))
    check_vocabulary(model, 96)
    with pytest.raises(UserError, match="97 token ids, but the model's vocabulary ends at 95: prepare the corpus with"):
        check_vocabulary(model, 97)
    save_model(model, tmp_path, tokenizer(96))
    assert (tmp_path / "tokenizer.json").exists()


def test_a_backend_that_cannot_serve_the_model_is_refused_before_it_runs(folder: Path) -> None:
    model = load_model(ModelConfig(path=str(folder)))
    for backend in ("auto", "cpu", "reference"):
        check_attention(model, backend, torch.device("cpu"))
    with pytest.raises(UserError, match="'flash_attn' runs on cuda, but the tensors are on cpu: use attention=cpu"):
        check_attention(model, "flash_attn", torch.device("cpu"))
    gemma = ARCHITECTURES["gemma2"].build()
    with pytest.raises(UserError, match="'cpu' cannot soft-cap scores.*use attention=reference"):
        check_attention(gemma, "cpu", torch.device("cpu"))


# -- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exports_load_with_plain_transformers(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].build(attention="reference")
    save_model(model, tmp_path)
    assert "anchor" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    full = (PackedLayout((0, 12)),)
    # float32, other kernels: up to 2e-6 measured, 2e-5 where logits are larger
    assert torch.allclose(logits(plain), logits(model.eval(), layouts=full), atol=2e-5)


def test_an_export_needs_no_anchorctx(folder: Path) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM;"
        f"m = AutoModelForCausalLM.from_pretrained({str(folder)!r});"
        "assert 'anchorctx' not in sys.modules; print(m.config._attn_implementation)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "sdpa"
    assert AutoConfig.from_pretrained(folder).vocab_size == 96
