"""Joining the process group."""

from __future__ import annotations

from pathlib import Path

from anchorctx.parallel import dist


def test_a_lock_that_a_killed_build_left_is_named(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    other = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"  # an extension that we never build
    other.parent.mkdir(parents=True)
    other.touch()
    dist._say_what_is_waited_for()
    assert not caplog.text
    lock = tmp_path / "py311_cpu" / "deepspeed_cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    dist._say_what_is_waited_for()
    assert f"remove {lock}" in caplog.text
