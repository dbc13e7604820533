from __future__ import annotations

from typing import Any

import pytest

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import ArmsConfig, ReuseConfig
from anchorctx.evals.evaluators.reuse.evaluator import arm_makers
from anchorctx.kvcomm.arms.names import ARMS, CONTROLS, SETTINGS, ArmSpec, make_arm, makers


def test_an_arm_may_have_its_main_setting_behind_a_colon() -> None:
    assert ArmSpec.parse("rotate") == ArmSpec("rotate")
    assert ArmSpec.parse("rotate_first_k:16") == ArmSpec("rotate_first_k", 16)
    assert ArmSpec.parse("kvcomm:.3") == ArmSpec("kvcomm", 0.3)
    first, glue, kvcomm = (make_arm(text) for text in ("rotate_first_k:16", "rotate_glue:0", "kvcomm:0.5"))
    found: list[Any] = [first.k, glue.k, kvcomm.pool.config.gamma]  # type: ignore[attr-defined]
    assert found == [16, 0, 0.5]


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
    ("text", "message"),
    [
        ("fast", "unknown arm 'fast': choose dense"),
        ("fast:3", "unknown arm 'fast'"),
        ("rotate:3", "arm 'rotate:3' has a setting, which rotate has not: write rotate, or choose rotate_first_k"),
        ("rotate_first_k:", "must have a whole number of at least 0 behind its colon, the k of rotate_first_k"),
        ("rotate_first_k:1.5", "must have a whole number of at least 0"),
        ("rotate_first_k:-1", "must have a whole number of at least 0"),
        ("kvcomm:nan", "arm 'kvcomm:nan' must have a number of at least 0"),
        ("kvcomm:inf", "must have a number"),
        ("kvcomm:0.3:2", "must have a number"),
        ("blend:1.1", "arm .blend:1.1. must have a number from 0 to 1 behind its colon, the share of blend"),
    ],
)
def test_wrong_names_and_settings_are_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_arm(text)
