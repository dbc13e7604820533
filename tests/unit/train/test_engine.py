"""The DeepSpeed configuration, which leaves nothing to "auto", and the meter's figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anchorctx.data.loader import Step
from anchorctx.errors import UserError
from anchorctx.flops import ModelFlops
from anchorctx.layout import PackedLayout
from anchorctx.models.config import LossKind, MemoryConfig
from anchorctx.parallel.dist import Ranks
from anchorctx.train.config import ExportConfig, OptimConfig, TrainConfig
from anchorctx.train.engine import ParallelConfig, deepspeed_config
from anchorctx.train.export import export
from anchorctx.train.meter import Meter


def generated(cuda: bool = False, dtype: torch.dtype = torch.float32, **options) -> dict:
    return deepspeed_config(ParallelConfig(**options), OptimConfig(), dtype=dtype, world=4, cuda=cuda)


def test_batch_sizes_multiply_and_nothing_is_auto() -> None:
    config = generated()
    assert config["train_batch_size"] == 4
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 1)
    assert "auto" not in str(config)
    assert not config["bf16"]["enabled"]


def test_bfloat16_weights_train_in_bfloat16_with_float32_states() -> None:
    bf16 = generated(dtype=torch.bfloat16, cuda=True)["bf16"]
    assert bf16 == {"enabled": True, "check_grad_overflow": True}  # no update from gradients that are not finite


def test_micro_batches_are_summed_in_float32_where_deepspeed_can() -> None:
    kinds = [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1), (torch.bfloat16, 2), (torch.bfloat16, 3)]
    found = [generated(dtype=dtype, zero_stage=stage)["data_types"]["grad_accum_dtype"] for dtype, stage in kinds]
    assert found == ["fp32", "fp32", "bf16", "fp32", "fp32"]


def test_offloading() -> None:
    config = generated(zero_stage=3, offload_optimizer=True, offload_parameters=True, cuda=True)
    zero = config["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "torch_adam" not in config["optimizer"]["params"]  # DeepSpeed's CPU Adam


def test_adamw_is_fused_on_cuda_where_foreach_holds_a_temporary_of_all_weights() -> None:
    adam = {cuda: generated(cuda=cuda)["optimizer"]["params"] for cuda in (True, False)}
    assert adam[True].get("fused") and "foreach" not in adam[True]
    assert adam[False].get("foreach") and "fused" not in adam[False]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"zero_stage": 0}, "parallel.zero_stage=0 must be between 1 and 3"),
        ({"zero_stage": 2, "offload_parameters": True}, "needs parallel.zero_stage=3, not 2"),
    ],
)
def test_combinations_that_do_not_exist(options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ParallelConfig(**options).validate()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"validate_every": -1}, "validate_every=-1"),
        ({"optim": OptimConfig(lr=0.0)}, "optim.lr=0.0 must be above 0"),
        ({"optim": OptimConfig(betas=[0.9])}, "must be two numbers"),
        ({"deterministic": True, "memory": MemoryConfig(loss=LossKind.liger)}, "memory.loss=liger.*use memory.loss=t"),
    ],
)
def test_training_settings_that_cannot_be_meant(options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TrainConfig(**options).validate()


def test_the_batch_is_stated_in_tokens() -> None:
    config = TrainConfig(tokens_per_step=1024)
    assert config.rows_per_step(64) == 16
    with pytest.raises(UserError, match="tokens_per_step=1024 must be a multiple of the row length, 100: use 1000"):
        config.rows_per_step(100)


def test_mfu_counts_what_the_layout_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of a known peak: MFU is the row's own operations over peak and time, so masking lowers it."""
    flops = ModelFlops(per_token=10.0, per_pair=1000.0, windows=(None,))
    monkeypatch.setattr("anchorctx.train.meter.peak_flops", lambda name: 1e6)
    meter = Meter(flops, Ranks(0, 2, torch.device("cpu")))
    monkeypatch.setattr("time.perf_counter", lambda: 102.0)
    meter._start = 100.0
    packed, whole = PackedLayout((0, 1, 5, 9), 1), PackedLayout((0, 9))
    row = meter.row(Step((), (0,), (packed,) * 4, 1.0, 20, 8, 3), data_seconds=0.5)
    assert row["perf/step_seconds"] == 2.0 and row["perf/tokens_per_second"] == 4 * 9 / 2
    pairs = 1 + 2 * (4 * 5 // 2 + 4)
    assert packed.attention_pairs() == pairs and whole.attention_pairs() == 45
    assert row["perf/mfu"] == pytest.approx(4 * (10 * 9 + 1000 * pairs) / 2.0 / (1e6 * 2))
    assert row["perf/attention_flops_saved"] == pytest.approx(1 - pairs / 45)
    assert row["data/documents_per_row"] == 2 and row["data/trained_tokens_per_row"] == 5
    assert row["data/long_documents"] == 3


def test_exporting_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no complete checkpoint: name the out_dir of a training run"):
        export(ExportConfig(run=str(tmp_path), out_dir=str(tmp_path / "out")))
    with pytest.raises(UserError, match="exists already: remove it, or choose another"):
        export(ExportConfig(run=str(tmp_path / "run"), out_dir=str(tmp_path)))
    assert not (tmp_path / "out").exists()
