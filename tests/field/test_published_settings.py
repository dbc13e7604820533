"""Settings under which checkpoints are published: read as their makers mean them, and exported so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from anchorctx.layout import PackedLayout
from anchorctx.models import ModelConfig, RopeConfig, RopeType, load_model, save_model
from anchorctx.models.build import build_config
from anchorctx.models.rope import reach
from anchorctx.testing.tiny import ARCHITECTURES, BASE, Architecture

IDS = torch.arange(3, 35)[None]
SMOLLM3 = Architecture("smollm3", {"no_rope_layers": [1, 0]})


def published(architecture: Architecture, folder: Path, without: tuple[str, ...] = (), **fields: Any) -> str:
    """A checkpoint whose config.json has other `fields`, and lacks some."""
    architecture.build().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: config[name] for name in config if name not in without}))
    return str(folder)


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False, **options).logits


def ours(path: str, **options: Any) -> torch.Tensor:
    return logits(
        load_model(ModelConfig(path=path, attention="reference", **options)), layouts=(PackedLayout((0, 32)),)
    )


def theirs(path: str | Path, **fields: Any) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **fields))


# huggingface/transformers #25773, #22520, tloen/alpaca-lora #7: Meta's "no padding", which torch counts from the end
def test_a_padding_token_of_minus_one_is_none(tmp_path: Path) -> None:
    model = load_model(ModelConfig(path=published(ARCHITECTURES["llama"], tmp_path, pad_token_id=-1)))
    embedding: Any = model.get_input_embeddings()
    assert embedding.padding_idx is None
    model(torch.tensor([[5, 95]]), layouts=(PackedLayout((0, 2)),)).logits.sum().backward()
    assert embedding.weight.grad[95].any()  # the last one, which would never be trained


# gradients-ai/G.O.D #1229: Yarn-Mistral and Mixtral have a head dimension of null, which YaRN reads
@pytest.mark.parametrize("name", ["mistral", "mixtral"])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_yarn_where_the_head_dimension_is_null(name: str, spelling: str, tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
    without = () if spelling == "rope_parameters" else ("rope_parameters",)
    fields = {spelling: yarn, "rope_theta": 1e4, "head_dim": None}
    path = published(ARCHITECTURES[name], tmp_path, without, **fields)
    found = ours(path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 8}))
    assert torch.allclose(found, theirs(path), atol=1e-5)


def test_yarn_for_a_new_model_without_a_head_dimension() -> None:
    fields = {"model_type": "mixtral", **BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": None}
    rope = RopeConfig(type=RopeType.yarn, factor=4.0)
    assert reach(load_model(ModelConfig(config=fields, rope=rope)).config) == 4 * 512


# InternLM/lmdeploy #3861, ml-explore/mlx-lm #1698, chrishayuk/larql #404: half of a head is rotated, said in one of two
# places
@pytest.mark.parametrize("place", ["outside", "inside"])
def test_the_rotated_share_of_a_head_stays(place: str, tmp_path: Path) -> None:
    share = {"partial_rotary_factor": 0.5}
    fields = share if place == "outside" else {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | share}
    path = published(
        Architecture("glm", {"head_dim": 8}), tmp_path / "in", ("rope_parameters",) * (place == "outside"), **fields
    )
    model = load_model(ModelConfig(path=path, rope=RopeConfig(theta=1e6)))
    save_model(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_parameters"]["partial_rotary_factor"] == written["partial_rotary_factor"] == 0.5
    assert written["rope_theta"] == 1e6


# huggingface/transformers #35896, #40126, Blackwellboy/model-serving-minefield #107: a window that is named, not used
@pytest.mark.parametrize(("used", "kinds"), [(False, ["full"] * 2), (True, ["full", "sliding"])])
def test_a_window_counts_where_it_is_used(used: bool, kinds: list[str], tmp_path: Path) -> None:
    fields = {"sliding_window": 5, "use_sliding_window": used, "max_window_layers": 1}
    path = published(ARCHITECTURES["qwen2"], tmp_path, ("layer_types",), **fields)
    assert build_config(ModelConfig(path=path)).layer_types == [f"{kind}_attention" for kind in kinds]
    assert torch.allclose(ours(path), theirs(path), atol=1e-5)


# huggingface/smollm #130, huggingface/transformers #43756, pytorch/executorch #22043: layers without rotation
def test_layers_without_rotation_stay_so(tmp_path: Path) -> None:
    path = published(SMOLLM3, tmp_path / "in")
    model = load_model(ModelConfig(path=path, rope=RopeConfig(theta=5e6), attention="reference"))
    found = logits(model, layouts=(PackedLayout((0, 32)),))
    save_model(model, tmp_path / "out")
    assert torch.allclose(found, theirs(tmp_path / "out"), atol=1e-5)
    assert not torch.allclose(found, theirs(tmp_path / "out", no_rope_layers=[1, 1]), atol=1e-2)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "scaling",
    [
        # meta-llama/llama3 #299, EleutherAI/lm-evaluation-harness #2133: as Llama 3.1 was published
        {"rope_type": "llama3", **LLAMA3},
        # axolotl-ai-cloud/axolotl #343: the type under its first name
        {"type": "linear", "factor": 2.0},
    ],
)
def test_scalings_as_they_were_written_first(scaling: dict[str, Any], tmp_path: Path) -> None:
    fields = {"rope_scaling": scaling, "rope_theta": 5e5}
    path = published(ARCHITECTURES["llama"], tmp_path, ("rope_parameters",), **fields)
    kind = scaling.get("rope_type", "linear")
    rest = {name: value for name, value in scaling.items() if name not in ("type", "rope_type")}
    for theta in (5e5, 1e7):
        changed = RopeConfig() if theta == 5e5 else RopeConfig(theta=theta)
        found = dict(build_config(ModelConfig(path=path, rope=changed)).rope_parameters)
        found.pop("type", None)
        assert found == {"rope_type": kind, "rope_theta": theta, **rest}


# turboderp-org/exllamav2 #803, vllm-project/vllm #4180, InfiniTensor/InfiniLM #387: several ends, more for chats
@pytest.mark.parametrize(("of_text", "of_chats"), [([1, 2], [1, 2]), (2, [2, 5])])
def test_several_ends_are_exported(of_text: Any, of_chats: Any, tmp_path: Path) -> None:
    path = published(ARCHITECTURES["llama"], tmp_path / "in", eos_token_id=of_text)
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps({"eos_token_id": of_chats}))
    save_model(load_model(ModelConfig(path=path)), tmp_path / "out")
    written = [json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert [fields["eos_token_id"] for fields in written] == [of_text, of_chats]
