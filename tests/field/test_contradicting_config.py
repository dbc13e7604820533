"""Checkpoints whose config.json says that head and embedding are one, while their weights are two, or the reverse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from anchorctx.errors import UserError
from anchorctx.evals import subject
from anchorctx.evals.config import EvalConfig
from anchorctx.evals.evaluators.precision import models
from anchorctx.evals.evaluators.precision.config import Arithmetic
from anchorctx.layout import PackedLayout
from anchorctx.models import ModelConfig, build_config, load_model
from anchorctx.models.load import check_weights, read_config
from anchorctx.models.save import save_model
from anchorctx.plan.config import PlanConfig
from anchorctx.plan.planner import Planner
from anchorctx.testing.tiny import save, text_model, word_tokenizer
from anchorctx.train import export

IDS = torch.arange(3, 19)[None]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rewrite(folder: Path, **fields: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A merged adapter: a head of its own beside tie_word_embeddings=true."""
    tokenizer = word_tokenizer(40)
    return rewrite(save(text_model(tokenizer, 64), tokenizer, tmp_path / "merged"), tie_word_embeddings=True)


def logits(model: PreTrainedModel, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, **kwargs).logits


def by_hand(folder: Path) -> torch.Tensor:
    """What the weights say, whatever the configuration does: the last hidden state times the file's head."""
    weights = load_file(folder / "model.safetensors")
    body = AutoModel.from_config(AutoConfig.from_pretrained(folder)).eval()
    body.load_state_dict({n.removeprefix("model."): w for n, w in weights.items() if n != HEAD})
    with torch.no_grad():
        return body(IDS).last_hidden_state @ weights[HEAD].T


def train(path: Path) -> torch.Tensor:
    model = load_model(ModelConfig(path=str(path)))
    assert model.config.tie_word_embeddings is False
    return logits(model, layouts=(PackedLayout((0, 16)),))


def evaluation(path: Path) -> torch.Tensor:
    config = EvalConfig(model=str(path), out_dir="x")
    (model,) = subject.models_of(config)
    return logits(subject.load(model, subject.read_config(model), subject.read_tokenizer(model), config).model)


def precision(path: Path) -> torch.Tensor:
    checkpoint = models.open_checkpoint(str(path), {}, "cpu")
    model = models.load(checkpoint, models.Weights.trained, Arithmetic.float32, 0)
    model.set_attn_implementation("sdpa")  # its own wants a probe
    return logits(model)


# hiyouga/LlamaFactory #10832, huggingface/transformers #45127, NVIDIA-NeMo/Automodel #2511, unslothai/unsloth #1971
@pytest.mark.parametrize("command", [train, evaluation, precision])
def test_the_head_of_a_merged_adapter_is_kept_and_said(
    command: Callable[[Path], torch.Tensor], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # other kernels than by hand: 6e-7 measured, on logits up to 1.5
    assert torch.allclose(command(folder), by_hand(folder), atol=2e-6)
    said = f"model {folder} has tie_word_embeddings=true in its configuration, but {HEAD} and {EMBEDDING} differ"
    assert sum(message.startswith(said) for message in caplog.messages) == 1


# as above: a plan counts the head's weights too
def test_a_plan_counts_the_head(folder: Path) -> None:
    weights = Planner(PlanConfig(model=ModelConfig(path=str(folder)), row_length=64)).weights
    tied = rewrite(folder, tie_word_embeddings=False)
    assert weights == Planner(PlanConfig(model=ModelConfig(path=str(tied)), row_length=64)).weights


# huggingface/transformers #28510: partitioned parameters look empty, and two empty ones equal, so that under ZeRO 3
# transformers ties them after all. The configuration from which it builds says otherwise by then.
def test_under_zero_3_the_configuration_says_so_before_the_weights_are_read(folder: Path) -> None:
    config = build_config(ModelConfig(path=str(folder)))
    assert config.tie_word_embeddings is False
    check_weights(str(folder), config)


# torch's .bin files hold a tied weight under both names
@pytest.mark.parametrize("binary", [True, False])
def test_one_weight_under_two_names_stays_tied(binary: bool, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[HEAD] = weights[EMBEDDING].clone()
    if binary:
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(ModelConfig(path=str(folder)))
    assert read_config(str(folder)).tie_word_embeddings is True and not caplog.messages
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# the reverse: tie_word_embeddings=false and no head, which transformers draws at random
def test_an_untied_model_without_a_head_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[HEAD]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(ModelConfig(path=str(folder)))  # tied: all there
    rewrite(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"has no lm_head\.weight: .*or set tie_word_embeddings to true in its config"):
        load_model(ModelConfig(path=str(folder)))


# -- the export -------------------------------------------------------------------------------------------------------


# a run that was trained before the head was kept: its own config.json contradicts its checkpoint
def test_an_export_keeps_a_head_that_the_run_calls_tied(folder: Path, tmp_path: Path) -> None:
    expected, weights = by_hand(folder), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    model, found = export._restore(folder, weights, "step_1", torch.float32)
    save_model(model, tmp_path / "out")
    export.verify_export(model, found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(fresh), expected, atol=2e-6)


# hiyouga/LlamaFactory #10832: model and folder are wrong alike, and only the checkpoint's weights can tell
def test_two_equally_wrong_models_are_not_compared_with_each_other(folder: Path, tmp_path: Path) -> None:
    config = read_config(str(folder))
    config.tie_word_embeddings = True
    weights = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights)
    model.tie_weights()
    save_model(model, tmp_path / "out")
    with pytest.raises(UserError, match=r"does not reproduce the checkpoint: logits differ by up to .*not written"):
        export.verify_export(model, weights, tmp_path / "out")


def test_a_length_that_was_lost_is_found(folder: Path, tmp_path: Path) -> None:
    """Which the logits of 64 tokens do not show."""
    model = load_model(ModelConfig(path=str(folder)))
    model.set_attn_implementation("sdpa")
    save_model(model, tmp_path / "out")
    rewrite(tmp_path / "out", max_position_embeddings=32)
    with pytest.raises(UserError, match="max_position_embeddings is 32, not 64; not written"):
        export.verify_export(model, dict(model.state_dict()), tmp_path / "out")
