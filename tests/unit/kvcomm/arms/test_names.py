from __future__ import annotations

import math
from typing import Any

import pytest

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import ArmsConfig, ReuseConfig
from anchorctx.evals.evaluators.reuse.evaluator import arm_makers
from anchorctx.kvcomm.arms.basic import RandomMoments, RotateFirst, RotateGlue
from anchorctx.kvcomm.arms.blend import Blend
from anchorctx.kvcomm.arms.names import ARMS, CONTROLS, SETTINGS, ArmSpec, make_arm, makers
from anchorctx.kvcomm.arms.offsets import MeanOffset
from anchorctx.kvcomm.arms.predicted import Predicted


def test_an_arm_may_have_its_main_setting_behind_a_colon() -> None:
    assert ArmSpec.parse("rotate") == ArmSpec("rotate")
    assert ArmSpec.parse("rotate_first_k:16") == ArmSpec("rotate_first_k", 16)
    assert ArmSpec.parse("kvcomm:.3") == ArmSpec("kvcomm", 0.3)
    first, glue, kvcomm = (make_arm(text) for text in ("rotate_first_k:16", "rotate_glue:0", "kvcomm:0.5"))
    found: list[Any] = [first.k, glue.k, kvcomm.pool.config.gamma]  # type: ignore[attr-defined]
    assert found == [16, 0, 0.5]


def test_arms_of_exemplars_may_have_further_settings() -> None:
    """Two readings of the paper's rule in one list of arms, over a configuration's own settings."""
    code = "h=values,weights_h=keys_values,reduce=per_token"
    names = ["kvcomm", f"kvcomm:0.5,{code}", "kvcomm:max_exemplars=5", f"kvcomm_ungated:{code}"]
    made = arm_makers(ReuseConfig(arms=names, settings=ArmsConfig(gamma=0.1, temperature=2.0)))
    text, public, small, ungated = (make().pool.config for make in list(made.values())[1:])  # type: ignore[attr-defined]
    assert (text.gamma, text.h, text.max_exemplars) == (0.1, "embeddings", 20)
    assert (public.gamma, public.h, public.weighs_by, public.reduce) == (0.5, "values", "keys_values", "per_token")
    assert (small.gamma, small.max_exemplars, small.h) == (0.1, 5, "embeddings")
    assert (ungated.gamma, ungated.h, ungated.reduce, ungated.temperature) == (1.0, "values", "per_token", 2.0)
    assert make_arm(f"kvcomm:{code}").pool.config.reduce == "per_token"  # type: ignore[attr-defined]


def test_every_arm_is_made_by_its_name_and_takes_its_setting() -> None:
    for name, make in makers().items():
        assert make().name == name
        if name in SETTINGS:
            make(1)
    assert set(makers()) == {*ARMS, *CONTROLS} and set(SETTINGS) <= set(ARMS)


def test_what_is_behind_the_colon_takes_the_place_of_the_settings() -> None:
    names = ["rotate_first_k", "rotate_first_k:2", "kvcomm", "kvcomm:0.7", "rotate_glue:3"]
    made = arm_makers(ReuseConfig(arms=names, settings=ArmsConfig(first=5, gamma=0.1, max_exemplars=9)))
    assert list(made) == ["dense", *names]
    arms: dict[str, Any] = {name: make() for name, make in made.items()}
    assert [arms[name].k for name in names if name.startswith("rotate")] == [5, 2, 3]
    pools = [arms[name].pool.config for name in ("kvcomm", "kvcomm:0.7")]
    assert [(pool.gamma, pool.max_exemplars) for pool in pools] == [(0.1, 9), (0.7, 9)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotateFirst(-1), "rotate_first_k k=-1 must be a whole number of at least 0: correct it"),
        (lambda: RotateFirst(2.5), "k=2.5 must be a whole number"),  # type: ignore[arg-type]
        (lambda: RotateGlue(-3), "rotate_glue k=-3 must be a whole number of at least 0"),
        (lambda: Blend(1.5), "blend share=1.5 must be a number from 0 to 1"),
        (lambda: Blend(-1), "share=-1 must be a number from 0 to 1"),
        (lambda: Blend(math.nan), "share=nan must be a number from 0 to 1"),
        (lambda: Blend("half"), "share='half' must be a number from 0 to 1"),  # type: ignore[arg-type]
        (lambda: Predicted(math.nan), "predicted bound=nan must be a finite number of at least 0"),
        (lambda: Predicted(-1), "bound=-1 must be a finite number of at least 0"),
        (lambda: Predicted(math.inf), "bound=inf must be a finite number of at least 0"),
        (lambda: Predicted(ladder=(-5,)), "ladder=-5 must be a whole number of at least 0"),
        (lambda: Predicted(tokens=0), "tokens=0 must be a whole number of at least 1"),
        (lambda: Predicted(warmup=math.nan), "warmup=nan must be a whole number of"),  # type: ignore[arg-type]
        (lambda: Predicted(miss=math.nan), "miss=nan must be above 0 and below 1"),
        (lambda: Predicted(miss=1.5), "miss=1.5 must be above 0 and below 1"),
        (lambda: Predicted(miss=1e-320), "raise warmup to inf or more, or miss"),
        (lambda: MeanOffset(0), "mean_offset warmup=0 must be a whole number of at least 1"),
        (lambda: RandomMoments(-1), "random seed=-1 must be a whole number of at least 0"),
    ],
)
def test_arms_made_in_python_have_the_same_bounds(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "unknown arm 'fast': choose dense"),
        ("fast:3", "unknown arm 'fast'"),
        ("rotate:3", "arm 'rotate:3' has a setting, which rotate has not: write rotate, or choose rotate_first_k"),
        ("rotate_first_k:", "must have a whole number of at least 0 behind its colon, the k of rotate_first_k"),
        ("rotate_first_k:1.5", "must have a whole number of at least 0"),
        ("rotate_first_k:-1", "must have a whole number of at least 0"),
        ("kvcomm:nan", "arm 'kvcomm:nan' must have a finite number of at least 0"),
        ("kvcomm:inf", "must have a finite number of at least 0"),
        ("predicted:inf", "must have a finite number of at least 0"),
        ("kvcomm:nan", "must have a finite number of at least 0"),
        ("kvcomm:0.3:2", "must have a finite number"),
        ("kvcomm:0.3,h=words", "must have one of embeddings, values, keys_values behind h=, the h of kvcomm"),
        ("kvcomm:0.3,max_exemplars=2.5", "must have a whole number of at least 1 behind max_exemplars="),
        ("kvcomm:max_exemplars=2", "min_exemplars=4 must not exceed max_exemplars=2"),
        ("kvcomm:0.3,0.4", "has '0.4', which is no setting of kvcomm: write temperature, min_exemplars"),
        ("kvcomm:h=values,h=values", "has 'h=values', which is no setting of kvcomm: .* each once"),
        ("kvcomm:gama=1", "has 'gama=1', which is no setting"),
        ("kvcomm_ungated:0.3", "has '0.3', which is no setting of kvcomm_ungated"),
        ("blend:0.3,h=values", "has 'h=values', which is no setting of blend: write blend:number alone"),
        ("blend:1.1", "arm .blend:1.1. must have a number from 0 to 1 behind its colon, the share of blend"),
    ],
)
def test_wrong_names_and_settings_are_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_arm(text)
