from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from anchorctx.data import packed_set as shards
from anchorctx.data.packed_set import PackedSet, ShardWriter
from anchorctx.data.packing.shard import Row
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout

T = 12


def random_row(rng: np.random.Generator, vocabulary: int = 100, weights: tuple[float, ...] = (0.0, 1.0)) -> Row:
    cuts = np.sort(rng.choice(np.arange(2, T), size=int(rng.integers(0, 4)), replace=False)).tolist()
    offsets = (0, 1, *cuts, T)
    doc_ids = (0, *(1 + rng.permutation(len(offsets) - 2)).tolist()) if rng.integers(2) else None
    chosen = rng.choice(np.array(weights, np.float32), size=T)
    return Row(rng.integers(0, vocabulary, T), chosen, PackedLayout(offsets, 1, doc_ids=doc_ids))


def write(
    folder: Path, rows: list[Row], vocabulary: int = 100, per_shard: int | None = None, name: str = "ab12"
) -> PackedSet:
    with ShardWriter(folder / name, T, vocabulary, 1, per_shard) as writer:
        for row in rows:
            writer.add(row, row.layout.num_documents)
        writer.close({"fingerprint": name, "row_length": T})
    return PackedSet.open(folder)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("per_shard", [1, 3, 10, None])
def test_rows_come_back_as_they_were(tmp_path: Path, per_shard: int | None) -> None:
    rng = np.random.default_rng(0)
    rows = [random_row(rng) for _ in range(10)]
    packed = write(tmp_path, rows, per_shard=per_shard)
    assert len(packed) == 10 and packed.row_length == T and packed.fingerprint == "ab12"
    for i in rng.permutation(10).tolist():
        row = packed.row(i)
        np.testing.assert_array_equal(row.input_ids, rows[i].input_ids)
        np.testing.assert_array_equal(row.loss_weights, rows[i].loss_weights)
        assert row.layout == rows[i].layout
        assert row.input_ids.dtype == np.int64 and row.loss_weights.dtype == np.float32
        assert packed.row_trained[i] == np.count_nonzero(row.loss_weights)
        assert packed.row_documents[i] == row.layout.num_documents


def large(folder: Path) -> PackedSet:
    """A set whose tokens are mapped: its file has more than a page."""
    rng = np.random.default_rng(0)
    return write(folder, [random_row(rng) for _ in range(500)])


def readers(packed: PackedSet, index: int) -> list[Callable[[], object]]:
    return [lambda: packed.row(index), lambda: packed.predictions(index, np.arange(3))]


@pytest.mark.parametrize("name", ["tokens", "weights", "offsets", "pointers"])
def test_a_shard_that_is_cut_short_while_it_is_read_is_named(tmp_path: Path, name: str) -> None:
    """What is mapped and no longer there would end the process with SIGBUS."""
    packed = large(tmp_path)
    packed.row(499)
    file = packed.folder / f"{name}_00000.npy"
    whole = file.stat().st_size
    os.truncate(file, 100)
    sentence = rf"{name}_00000.npy has 100 of {whole} bytes: it was changed after it was written: remove .*ab12 and"
    for read in readers(packed, 499)[: 2 if name in ("tokens", "weights") else 1]:
        with pytest.raises(UserError, match=sentence):
            read()


def test_a_shard_that_is_overwritten_while_it_is_read_is_named(tmp_path: Path) -> None:
    packed = large(tmp_path)
    packed.row(499)
    for name, dtype in (("tokens", np.uint16), ("pointers", np.int64)):
        mapped = np.load(packed.folder / f"{name}_00000.npy", mmap_mode="r+")
        assert mapped.dtype == dtype
        mapped[:] = 999
        mapped.flush()
    for read in (lambda: packed.predictions(499, np.arange(3)), lambda: packed.row(499)):
        with pytest.raises(UserError, match=r"row 499 in .* has the token 999, of a vocabulary of 100: it was changed"):
            read()
    with pytest.raises(UserError, match=r"row 499 in .* has no documents that fill it: it was changed after"):
        packed.layout(499)


def test_a_set_that_is_removed_while_it_is_read_is_read_on(tmp_path: Path) -> None:
    packed = large(tmp_path)
    before = packed.row(499)
    (packed.folder / "tokens_00000.npy").unlink()
    np.testing.assert_array_equal(packed.row(499).input_ids, before.input_ids)


def test_rows_beyond_the_set(tmp_path: Path) -> None:
    packed = write(tmp_path, [random_row(np.random.default_rng(0)) for _ in range(4)], per_shard=3)
    for index in (-1, 4):
        with pytest.raises(IndexError):
            packed.row(index)


def test_the_sum_of_weights_is_of_what_a_reader_gets(tmp_path: Path) -> None:
    """Losses are divided by it; float16 has no 0.1."""
    rng = np.random.default_rng(1)
    packed = write(tmp_path, [random_row(rng, weights=(0.0, 0.1, 0.3, 1.0)) for _ in range(20)], per_shard=7)
    read = [float(packed.row(i).loss_weights.sum(dtype=np.float64)) for i in range(20)]
    assert packed.row_weight.tolist() == read


def test_numbers_are_stored_as_narrowly_as_they_allow(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    exact = write(tmp_path / "a", [random_row(rng)], vocabulary=2**16)
    wide = write(tmp_path / "b", [random_row(rng, 2**16 + 1, (0.0, 0.1))], vocabulary=2**16 + 1)
    kinds = [
        (np.load(s.folder / "tokens_00000.npy").dtype, np.load(s.folder / "weights_00000.npy").dtype)
        for s in (exact, wide)
    ]
    assert kinds == [(np.uint16, np.uint8), (np.uint32, np.float16)]


@pytest.mark.parametrize("vocabulary", [2**16, 2**16 + 1])
def test_the_highest_id_survives_and_the_next_is_refused(tmp_path: Path, vocabulary: int) -> None:
    ids = np.full(T, vocabulary - 1)
    row = Row(ids, np.zeros(T, np.float32), PackedLayout((0, 1, T), 1))
    assert write(tmp_path, [row], vocabulary).row(0).input_ids.tolist() == ids.tolist()
    with (
        ShardWriter(tmp_path / "other", T, vocabulary, 1) as writer,
        pytest.raises(ValueError, match=f"token id {vocabulary} is beyond the vocabulary of {vocabulary}"),
    ):
        writer.add(Row(ids + 1, row.loss_weights, row.layout), 1)


def test_a_shard_is_bounded_in_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3 * T + 1)
    rows = [random_row(np.random.default_rng(3)) for _ in range(7)]
    packed = write(tmp_path, rows)
    assert packed.manifest["rows_per_shard"] == 3
    assert sorted(f.name for f in packed.folder.glob("tokens_*")) == [f"tokens_0000{i}.npy" for i in range(3)]
    assert [packed.row(i).input_ids.tolist() for i in range(7)] == [row.input_ids.tolist() for row in rows]
    monkeypatch.setattr(shards, "SHARD_TOKENS", T - 1)  # a row longer than a shard is a shard
    assert write(tmp_path / "long", rows[:2]).manifest["rows_per_shard"] == 1


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    rows = [random_row(np.random.default_rng(4)) for _ in range(6)]
    packed = write(tmp_path, rows, per_shard=1)
    for i in (0, 5, 1, 0, 3, 5, 0):
        np.testing.assert_array_equal(packed.row(i).input_ids, rows[i].input_ids)


# -- whole, or not there --------------------------------------------------------------------------------------------


def test_nothing_is_left_of_an_interrupted_writer(tmp_path: Path) -> None:
    row = random_row(np.random.default_rng(5))
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "ab12", T, 100, 1, 1) as writer:
        writer.add(row, 1)
        assert hidden(tmp_path) and not (tmp_path / "ab12").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="holds no packed set: make one with `anchorctx prepare"):
        PackedSet.open(tmp_path)
    assert len(write(tmp_path, [row])) == 1


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from anchorctx.data.packed_set import ShardWriter\n"
        "ShardWriter(Path(sys.argv[1]), 12, 100, 1); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "ab12")], check=False).returncode == 9
    assert len(hidden(tmp_path)) == 1
    write(tmp_path, [random_row(np.random.default_rng(6))])
    assert hidden(tmp_path) == []


def test_two_writers_of_one_set_do_not_touch_each_other(tmp_path: Path) -> None:
    rows = [random_row(np.random.default_rng(7)) for _ in range(3)]
    manifest = {"fingerprint": "ab12", "row_length": T}
    with ShardWriter(tmp_path / "ab12", T, 100, 1, 2) as first, ShardWriter(tmp_path / "ab12", T, 100, 1, 2) as second:
        assert first.folder != second.folder
        for row in rows:
            first.add(row, 1)
            second.add(row, 1)
        first.close({**manifest, "by": "first"})
        packed = PackedSet.open(tmp_path)
        assert second.close({**manifest, "by": "second"}) == tmp_path / "ab12"
    assert PackedSet.open(tmp_path).manifest["by"] == "first"  # what may be in use already is not replaced
    np.testing.assert_array_equal(packed.row(2).input_ids, rows[2].input_ids)
    assert hidden(tmp_path) == []


def test_a_folder_without_manifest_gives_way(tmp_path: Path) -> None:
    (tmp_path / "ab12").mkdir()
    (tmp_path / "ab12" / "tokens_00000.npy").write_bytes(b"half")
    assert len(write(tmp_path, [random_row(np.random.default_rng(8))])) == 1


# -- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> PackedSet:
    rng = np.random.default_rng(9)
    return write(tmp_path, [random_row(rng, weights=(0.0, 0.1)) for _ in range(5)], per_shard=2)


FILES = [f"{kind}_00001.npy" for kind in shards.ARRAYS] + ["rows.npz"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_noticed(packed: PackedSet, name: str) -> None:
    file = packed.folder / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        PackedSet.open(packed.folder)
    expected = f"{file} was changed after it was written: remove {packed.folder} and prepare it again"
    assert str(error.value) == expected


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verify", [True, False])
def test_a_short_or_missing_file_is_noticed(packed: PackedSet, name: str, verify: bool) -> None:
    file = packed.folder / name
    expected = f"{file} is missing or cut short: remove {packed.folder} and prepare it again"
    os.truncate(file, file.stat().st_size - 1)
    for _ in range(2):
        with pytest.raises(UserError) as error:
            PackedSet.open(packed.folder, verify=verify)
        assert str(error.value) == expected
        file.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "Invalid JSON"),
        (
            json.dumps({"command": "train"}),
            "fingerprint: Field required.: name a packed set that anchorctx prepare made, or remove",
        ),
        ("[]", "manifest.json is not of the form that anchorctx writes .Input should be an object"),
    ],
)
def test_a_manifest_of_something_else(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        PackedSet.open(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_manifest_names_no_file_outside_its_folder(packed: PackedSet, name: str) -> None:
    (packed.folder.parent / "outside").write_text("x")
    manifest = json.loads((packed.folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (packed.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"manifest.json names {name}, outside its folder: it was not made by"):
        PackedSet.open(packed.folder)


def test_a_pickle_among_the_arrays_is_not_opened(packed: PackedSet, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    np.savez(packed.folder / "rows.npz", weight=np.array([Runs()], dtype=object))
    manifest = json.loads((packed.folder / "manifest.json").read_text())
    manifest["files"]["rows.npz"]["bytes"] = (packed.folder / "rows.npz").stat().st_size
    (packed.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="rows.npz holds no plain arrays: prepare the set again"):
        PackedSet.open(packed.folder, verify=False)
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_several_sets(packed: PackedSet) -> None:
    write(packed.folder.parent / "x", [packed.row(0)], name="cd34").folder.rename(packed.folder.parent / "cd34")
    with pytest.raises(UserError, match=r"holds 2 packed sets \(ab12, cd34\): name one of them"):
        PackedSet.open(packed.folder.parent)
