"""One process and two give the same run at every ZeRO stage, and what is exported is what was trained."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from anchorctx.data.packed_set import PackedSet
from anchorctx.train.config import ExportConfig
from anchorctx.train.export import export

from .runs import curve, metrics

pytestmark = pytest.mark.distributed
NAMES = ("train/loss", "train/grad_norm", "val/loss")


@pytest.fixture(scope="module")
def alone(launcher):
    return launcher.run("alone", 1, "micro_tokens=136")


STAGES = (1, 2, 3)


@pytest.fixture(scope="module", params=[1, 2])
def staged(request, launcher):
    """Runs at every ZeRO stage with that many processes."""
    processes = request.param
    names = [f"zero{stage}_{processes}" for stage in STAGES]
    results = launcher.several(
        processes, [(n, f"parallel=zero{stage}") for n, stage in zip(names, STAGES, strict=True)]
    )
    assert [result["code"] for result in results] == [0, 0, 0], results
    return [launcher.root / name for name in names]


@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_gives_the_curve_of_one_process(staged, alone, stage):
    run = staged[stage - 1]
    np.testing.assert_allclose(curve(run, *NAMES), curve(alone, *NAMES), rtol=1e-5)
    assert curve(run, "train/grad_norm")[1:].max() > 0.3  # clipping was at work
    assert curve(run, "train/loss")[-1] < curve(run, "train/loss")[1] - 0.3  # and it learnt


@pytest.mark.parametrize("stage", STAGES)
def test_the_exported_folder_has_the_loss_that_training_saw(launcher, staged, stage, tmp_path):
    run = staged[stage - 1]
    folder = export(ExportConfig(run=str(run), out_dir=str(tmp_path / "exported")))
    config = json.loads((folder / "config.json").read_text())
    assert "attn_implementation" not in json.dumps(config)
    assert plain_validation_loss(folder, launcher.validation) == pytest.approx(metrics(run)[-1]["val/loss"], rel=1e-5)


def plain_validation_loss(folder, validation):
    """Validation loss by transformers' eager attention under a dense mask, logits in full: none of our fast paths."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    packed = PackedSet.open(validation)
    total = weight = 0.0
    for row in map(packed.row, range(len(packed))):
        ids, trained = torch.from_numpy(row.input_ids), torch.from_numpy(row.loss_weights[1:] > 0)
        mask = torch.zeros(1, 1, packed.row_length, packed.row_length)
        mask.masked_fill_(~row.layout.allowed(), torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = model(ids[None], attention_mask=mask, position_ids=row.layout.position_ids()[None]).logits
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:], reduction="none")
        total += float(losses[trained].sum())
        weight += float(trained.sum())
    return total / weight


def test_activation_checkpointing_and_accumulation_change_nothing(launcher, alone):
    run = launcher.run("recomputed", 1, "memory.checkpoint_every=1", "micro_tokens=24")
    np.testing.assert_allclose(curve(run, *NAMES), curve(alone, *NAMES), rtol=1e-5)


def test_metrics_have_what_the_dashboard_groups(alone):
    row = metrics(alone)[-1]
    for name in (
        *("step", "tokens", "train/loss", "train/lr", "train/grad_norm", "val/loss", "val/perplexity"),
        *("perf/step_seconds", "perf/tokens_per_second", "perf/data_seconds", "perf/attention_flops_saved"),
        *("memory/peak_gib", "data/documents_per_row", "data/trained_tokens_per_row", "data/long_documents"),
        "perf/exchanged_bytes",
    ):
        assert np.isfinite(row[name]), name
    assert 0 < row["perf/attention_flops_saved"] < 1
    manifest = json.loads((alone / "manifest.json").read_text())
    assert manifest["command"] == "train"
    assert manifest["config"]["steps"] == 6


OLDER_TRANSFORMERS = """
import contextlib, sys
import transformers.modeling_utils
transformers.modeling_utils.prevent_arange_dtype_change = contextlib.nullcontext  # which 5.17 does not have yet
from anchorctx.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_zero_3_in_bfloat16_keeps_exact_angles_whatever_the_loader_rounds(launcher, alone, tmp_path):
    exported = export(ExportConfig(run=str(alone), out_dir=str(tmp_path / "exported")))
    losses = []
    for name, sharded in (("sharded", "true"), ("whole", "false")):
        words = launcher.overrides(name, f"model.path={exported}", "model.dtype=bfloat16", "parallel=zero3", "steps=2")
        words = [word for word in words if not word.startswith("model.config=")]
        command = [sys.executable, "-c", OLDER_TRANSFORMERS, "train", *words, f"memory.sharded_loading={sharded}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append(curve(launcher.root / name, "train/loss"))
    np.testing.assert_array_equal(*losses)
