"""Writing a checkpoint while the training goes on.

`save` copies this rank's states to memory and returns; a thread writes them. Each rank's thread announces its files in
`written_00000.json`; rank 0's waits for all of these, lists the files in `COMPLETE` and gives the folder its name. So
no thread needs a collective, and a kill before that loses this checkpoint alone. The next `save` waits for the one
before, and ends the run where a rank could not write. The last checkpoint of a run is waited for.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from anchorctx.errors import UserError
from anchorctx.parallel import dist
from anchorctx.records.disk import FREE, DiskError, Writing, free_space
from anchorctx.records.files import remove
from anchorctx.records.manifest import write_json
from anchorctx.records.typed import read_typed
from anchorctx.train.checkpoints import rng, states, tensors
from anchorctx.train.checkpoints.digest import sync_folder, write_digested_json
from anchorctx.train.checkpoints.folders import (
    MARKER,
    STATE,
    File,
    Marker,
    State,
    partial_folder,
    prune,
    step_folder,
)
from anchorctx.train.checkpoints.headroom import fits_twice
from anchorctx.train.checkpoints.tensors import Fragment
from anchorctx.train.config import CheckpointConfig

LOOK_S = 0.05
"""Seconds between looks for the other ranks' files."""
PATIENCE_S = 60.0
"""Seconds to wait for them when the training failed."""


@dataclasses.dataclass
class _Writing:
    """One checkpoint on its way."""

    folder: Path
    """Under its final name."""
    state: State
    thread: threading.Thread | None = None
    own: threading.Event = dataclasses.field(default_factory=threading.Event)
    """This rank's files are written, or `error` says why not."""
    given_up: threading.Event = dataclasses.field(default_factory=threading.Event)
    """A rank could not write: there will be no checkpoint."""
    error: BaseException | None = None


class Writer:
    """Writes the checkpoints of a run, one at a time."""

    def __init__(
        self,
        root: Path,
        run: str,
        ranks: dist.Ranks,
        config: CheckpointConfig,
        damaged: Collection[Path] = (),
    ) -> None:
        """`root` is the folder of checkpoints, `run` the name under which they are written (rank 0's counts).

        Pruning does not count those that are `damaged`. The caller holds the run's lock: what a killed process left
        half-written is removed.
        """
        self._root, self._run, self._ranks, self._config, self._damaged = root, run, ranks, config, damaged
        self._writing: _Writing | None = None
        if ranks.is_main:
            for left in root.glob(".step_*.partial"):  # by a kill; it only fills the disk
                remove(left)

    def save(self, engine: Any, state: State, *, wait: bool) -> Path:
        """Write a checkpoint from every rank; returns the folder that it will have.

        `wait` returns when it is there. Raises what went wrong with the one before, or with this one under `wait`.
        """
        self.finish()
        final = step_folder(self._root, state.step)
        partial = partial_folder(final)
        if self._ranks.is_main:
            remove(partial)
            partial.mkdir(parents=True)
        dist.barrier()
        fragments, updates = states.read_out(engine, self._ranks.is_main)
        self._ask_for_space(partial, sum(map(_bytes, fragments)))
        if copied := not wait and fits_twice(sum(map(_bytes, fragments))):
            fragments = [_copied(fragment) for fragment in fragments]
        self._writing = writing = _Writing(final, state)
        arguments = (writing, fragments, updates, rng.random_states())
        writing.thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        writing.thread.start()
        if not copied:
            writing.own.wait()  # the fragments are views of what the next update changes
        if wait:
            self.finish()
        return final

    def finish(self) -> None:
        """Wait until the checkpoint on its way is there; raises what went wrong with it, on every rank."""
        if (writing := self._writing) is None:
            return
        assert writing.thread is not None
        writing.own.wait()
        failed = self._has_failed(writing)
        if failed:
            writing.given_up.set()
        writing.thread.join()
        self._writing = None
        if not failed and not self._has_failed(writing):  # again: rank 0 may have failed at the end
            return
        if self._ranks.is_main:
            shutil.rmtree(partial_folder(writing.folder), ignore_errors=True)  # half of one only fills the disk
        if writing.error is not None:
            raise self._of_disk().error(writing.error) or writing.error
        raise UserError(
            f"{writing.folder} was not written, because another process could not write its part: see its message; "
            "the checkpoints before are intact"
        )

    def close(self) -> None:
        """Let the checkpoint on its way become whole, where the training ended for another reason; raises nothing."""
        if (writing := self._writing) is not None and writing.thread is not None:
            writing.thread.join(PATIENCE_S)
            writing.given_up.set()  # another rank is gone
            writing.thread.join()

    def _ask_for_space(self, partial: Path, mine: int) -> None:
        """DiskError, on every rank, where there is no room for the ranks' states; `mine` are this one's bytes."""
        whole = round(dist.total([float(mine)], self._ranks.device)[0])
        room = free_space(self._root)
        # each machine may see another file system
        free = [bytes for bytes in dist.gathered(room, self._ranks) if bytes is not None]
        if free and min(free) < whole:
            if self._ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise DiskError(self._of_disk(whole).sentence("too little space is left", FREE))

    def _of_disk(self, needed: int | None = None) -> Writing:
        return Writing("the checkpoint", self._root, needed, "the checkpoints before are intact")

    def _has_failed(self, writing: _Writing) -> bool:
        """On any rank; each must ask."""
        return dist.total([float(writing.error is not None)], self._ranks.device)[0] > 0

    def _write(self, writing: _Writing, fragments: list[Fragment], updates: int, random: dict[str, Any]) -> None:
        """In the thread: this rank's files, and by rank 0 all that makes them a checkpoint."""
        rank, partial = self._ranks.rank, partial_folder(writing.folder)
        try:
            files = {
                (name := tensors.file_name(rank)): tensors.write(partial / name, fragments, updates),
                (name := rng.file_name(rank)): write_digested_json(partial / name, random),
            }
            fragments.clear()
            if self._ranks.is_main:
                files[STATE] = write_digested_json(partial / STATE, dataclasses.asdict(writing.state))
            write_json(partial / _announcement(rank), {name: dataclasses.asdict(file) for name, file in files.items()})
            writing.own.set()
            if self._ranks.is_main:
                self._publish(writing)
        except BaseException as error:  # raised by the next `finish`
            writing.error = error
        finally:
            writing.own.set()

    def _publish(self, writing: _Writing) -> None:
        partial, files = partial_folder(writing.folder), {}
        for rank in range(self._ranks.world):
            path = partial / _announcement(rank)
            while not path.is_file():
                if writing.given_up.is_set():
                    return
                time.sleep(LOOK_S)
            files |= read_typed(path, dict[str, File], "it was just written: the disk is damaged")
            path.unlink()
        write_digested_json(partial / MARKER, dataclasses.asdict(Marker(self._run, dict(sorted(files.items())))))
        remove(writing.folder)
        sync_folder(partial)
        partial.rename(writing.folder)
        sync_folder(self._root)  # on the disk before older ones go
        prune(self._root, self._config, writing.folder, self._damaged)


def _announcement(rank: int) -> str:
    return f"written_{rank:05d}.json"


def _bytes(fragment: Fragment) -> int:
    return sum(tensor.nbytes for tensor in fragment.states.values())


def _copied(fragment: Fragment) -> Fragment:
    parts = {kind: tensor.detach().to("cpu", copy=True) for kind, tensor in fragment.states.items()}
    return dataclasses.replace(fragment, states=parts)
