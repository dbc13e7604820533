import math

import pytest
import torch

from anchorctx.errors import UserError
from anchorctx.train.config import OptimConfig, Schedule
from anchorctx.train.engine import parameter_groups


def test_warmup_is_linear_and_reaches_the_peak():
    config = OptimConfig(lr=1.0, warmup_steps=3, schedule=Schedule.constant)
    assert [config.lr_at(step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_from_the_peak_to_the_minimum():
    config = OptimConfig(lr=2.0, warmup_steps=0, schedule=Schedule.cosine, min_lr_ratio=0.1)
    rates = [config.lr_at(step, 100) for step in range(101)]
    assert rates[0] == 2.0
    assert math.isclose(rates[100], 0.2)
    assert math.isclose(rates[50], 1.1)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"clip": -1.0}, "clip=-1.0"),
        ({"betas": [0.9]}, "betas=[0.9]"),
        ({"betas": [0.9, 1.0]}, "1.0"),
    ],
)
def test_values_that_make_no_sense_are_refused(change, named):
    with pytest.raises(UserError, match="optim") as caught:
        OptimConfig(**change).validate()
    assert named in str(caught.value)


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model[1].weight.requires_grad_(False)
    matrices, vectors = parameter_groups(model.named_parameters(), 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in matrices["params"]] == [(4, 3)]
    assert len(vectors["params"]) == 2  # the linear layer's bias and the norm's bias
