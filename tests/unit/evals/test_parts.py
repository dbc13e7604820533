"""What an evaluation that was cut off finds again."""

from __future__ import annotations

from pathlib import Path

from anchorctx.evals.parts import FOLDER, Parts


def test_whole_parts_are_found_again_and_an_unfinished_one_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / FOLDER / "unit.jsonl"
    parts = Parts(file)
    parts.add({"at": [0, 0], "kl": 0.1 + 0.2})
    parts.add({"at": [0, 1], "kl": 1e-300})
    with file.open("ab") as torn:
        torn.write(b'{"at": [1, 0], "k')
    again = Parts(file)
    assert again.done == parts.done == [{"at": [0, 0], "kl": 0.1 + 0.2}, {"at": [0, 1], "kl": 1e-300}]
    again.add({"at": [1, 0]})
    assert [part["at"] for part in Parts(file).done] == [[0, 0], [0, 1], [1, 0]]


def test_a_finished_unit_leaves_nothing(tmp_path: Path) -> None:
    one, other = (Parts(tmp_path / FOLDER / name) for name in ("one", "other"))
    one.add(1)
    other.add(2)
    one.remove()
    assert [path.name for path in tmp_path.glob("*/*")] == ["other"]
    other.remove()
    assert not list(tmp_path.iterdir())
    memory = Parts()
    memory.add(3)
    memory.remove()
    assert memory.done == [3] and not list(tmp_path.iterdir())
