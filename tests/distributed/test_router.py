"""A mixture of experts with its load-balancing loss: one run, whatever the pieces and processes, and when resumed."""

import json

import numpy as np
import pytest

from .runs import curve, metrics

pytestmark = pytest.mark.distributed
NAMES = ("train/loss", "train/router_loss", "train/grad_norm", "val/loss")
MIXTRAL = (
    # experts have more entries than ZeRO 3's persistence threshold, so that they are partitioned
    "model.config={model_type: mixtral, vocab_size: 4096, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, "
    "num_local_experts: 4, num_experts_per_tok: 2, sliding_window: null, output_router_logits: true, "
    "router_aux_loss_coef: 0.5, initializer_range: 0.2}"
)


@pytest.fixture(scope="module")
def alone(launcher):
    off = MIXTRAL.replace("router_logits: true", "router_logits: false")
    runs = [("alone", MIXTRAL), ("half", MIXTRAL, "steps=3"), ("half", MIXTRAL), ("off", off, "steps=1")]
    results = launcher.several(1, runs)
    assert [result["code"] for result in results] == [0] * 4, results
    return launcher.root / "alone"


def test_two_processes_with_small_pieces_give_the_run_of_one_at_stages_2_and_3(launcher, alone):
    small = (MIXTRAL, "micro_tokens=24", "memory.checkpoint_every=1")
    results = launcher.several(2, [("two", *small), ("three", *small, "parallel=zero3")])
    assert [result["code"] for result in results] == [0, 0], results
    for name in ("two", "three"):
        np.testing.assert_allclose(curve(launcher.root / name, *NAMES), curve(alone, *NAMES), rtol=1e-5)


def test_a_resumed_run_goes_on_with_the_fractions_of_the_step_before(launcher, alone):
    kept = ("step", *NAMES)
    ours, theirs = ([{k: row.get(k) for k in kept} for row in metrics(launcher.root / r)] for r in ("half", "alone"))
    assert ours == theirs
    state = json.loads((alone / "checkpoints" / "step_00000006" / "state.json").read_text())
    assert sum(state["router_fractions"]) == pytest.approx(2.0)  # experts of a token


def test_without_it_nothing_of_it_is_trained_or_logged(launcher, alone):
    off = launcher.root / "off"
    assert np.isnan(curve(off, "train/router_loss")).all()
    norms = [curve(run, "train/grad_norm")[1, 0] for run in (off, alone)]
    # the first step's own losses are those of the same weights: only the router's gradient is missing
    assert curve(off, "train/loss")[1, 0] == curve(alone, "train/loss")[1, 0] and abs(norms[0] / norms[1] - 1) > 1e-3
