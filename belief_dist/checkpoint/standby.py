"""The newest steps of a run in the memory of its hosts, so that a lost rank costs no steps.

A checkpoint like any other, in a folder on every host's memory file system: the part of each rank
is written there by the rank itself, and to the folder of another host by a rank of that host. When
a rank has died, its host's folder is still there; when a host has, another one has its ranks' part.
Ranks that come after them, as many as there are then, load the newest step of which every part is
in some folder, and fetch from other hosts only the files that they read.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from belief_dist.checkpoint import run_directory
from belief_dist.checkpoint.async_save import BackgroundSaver
from belief_dist.checkpoint.checksummed_files import (
    MANIFEST,
    Checksum,
    check_files,
    read_manifest,
    write_manifest,
)
from belief_dist.checkpoint.errors import CheckpointError, run_together
from belief_dist.checkpoint.file_transfer import Transfer, transfer
from belief_dist.checkpoint.loading import Loaded, files_of_metadata, load_from
from belief_dist.checkpoint.safe_reader import METADATA_FILE
from belief_dist.checkpoint.saving import write_files
from belief_dist.sharding.collectives import Collectives

logger = logging.getLogger("belief_dist")


class _Found(NamedTuple):
    """A step in the folder of a host."""

    files: dict[str, Checksum]  # of all hosts
    here: set[str]  # which of them are in this folder


class Standby(BackgroundSaver):
    """Keeps the newest step of a run in the hosts' memory; every method is called by all ranks.

    ::

        with Standby("/dev/shm/my-run", model=model, optimizer=optimizer) as standby:
            loaded = standby.resume()  # None in the first start
            for step in range(loaded.step if loaded else 0, steps):
                ...
                standby.save(step + 1)

    `save` copies the states and returns; a thread writes them while training goes on. Each host
    holds, per rank, a copy of the rank's part for the thread, the part of the newest step (while
    one is written, of two) and as much for ranks of another host. A block that ends without an
    exception removes the folder.

    Args:
        folder: On every host, on a file system in memory; ranks that see the same one are one
            host's. It is made, and must belong to this user alone.
        model, optimizer, scaler, process_group: As for `checkpoint.save`.
        timeout: How long to wait for a rank before that is an error.

    Raises:
        CheckpointError: On all ranks: some folder cannot be made, or others may write to it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: torch.nn.Module | None = None,
        optimizer: Optimizer | None = None,
        scaler: Any = None,
        process_group: dist.ProcessGroup | None = None,
        timeout: timedelta = timedelta(minutes=5),
    ) -> None:
        """See the class."""
        super().__init__(
            folder,
            model=model,
            optimizer=optimizer,
            scaler=scaler,
            keep=1,
            process_group=process_group,
            timeout=timeout,
        )
        what = f"cannot keep steps in {self._run}"
        self._leader_of = _find_leaders(self._flags, what, self._run)

    @property
    def _is_leader(self) -> bool:
        """Whether this rank works on its host's folder."""
        return self._leader_of[self._comm.rank] == self._comm.rank

    # - Saving; in the writing thread

    def _store(self, step: int, entries: dict[str, Any]) -> tuple[Path, int]:
        """Write to this host's folder and to another one's; the older step goes when all have."""
        comm, run = self._writers, self._run
        what = f"cannot keep step {step} in {run}"
        begun = run_together(
            comm, what, lambda: run_directory.begin(run, step) if self._is_leader else None
        )
        temporary = comm.exchange(begun)[self._leader_of[comm.rank]]
        assert temporary is not None
        try:
            own = write_files(comm, comm.group, what, temporary, entries)
            checksums = self._spread(what, temporary, own)

            def publish() -> Path | None:
                if not self._is_leader:
                    return None
                write_manifest(temporary, checksums, step, run_directory.next_serial(run))
                return run_directory.publish(temporary, step)

            published = comm.exchange(run_together(comm, what, publish))
        except CheckpointError:
            if self._is_leader:
                run_directory.give_up(temporary)
            raise
        # Only now: until here, some host could have been lost that had not the new one.
        if self._is_leader:
            run_directory.retain(run, 1)
        path = published[self._leader_of[comm.rank]]
        assert path is not None
        return path, sum(each.nbytes for each in own.values())

    def _spread(self, what: str, temporary: Path, own: dict[str, Checksum]) -> dict[str, Checksum]:
        """Copy every rank's file to another host, and DCP's metadata to all."""
        comm = self._writers
        everyone = comm.exchange(own)
        copies = []
        for rank, files in enumerate(everyone):
            for name, checksum in files.items():
                if name == METADATA_FILE:
                    targets = [r for r in self._leaders() if r != self._leader_of[rank]]
                else:
                    targets = self._partner(rank)
                copies += [Transfer(name, checksum.nbytes, rank, target) for target in targets]
        if copies:
            transfer(comm, what, copies, temporary)
        return {name: checksum for files in everyone for name, checksum in files.items()}

    def _leaders(self) -> list[int]:
        return sorted({*self._leader_of})

    def _partner(self, rank: int) -> list[int]:
        """Return the rank that keeps a copy of a rank's part: as far on as its host has ranks."""
        size, own = self._comm.world_size, self._leader_of[rank]
        begin = self._leader_of.count(own)
        others = [(rank + begin + k) % size for k in range(size)]
        return [other for other in others if self._leader_of[other] != own][:1]

    # - Resuming

    def resume(self) -> Loaded | None:
        """Load the newest step that is complete over all hosts; None if there is none.

        Raises:
            CheckpointError: On every rank: it is damaged, or does not fit.
        """
        self.wait()
        comm, run = self._flags, self._run
        what = f"cannot resume from {run}"
        found = comm.exchange(run_together(comm, what, self._look))
        step = _newest_complete(found)
        if step is None:
            return None
        files = next(each[step].files for each in found if step in each)
        present = [each[step].here if step in each else set() for each in found]
        path = run / run_directory.directory_name(step)

        def prepare() -> None:
            if self._is_leader and not (path / MANIFEST).exists():
                path.mkdir(exist_ok=True)
                write_manifest(path, files, step, 0)

        run_together(comm, what, prepare)

        def fetch(names: set[str]) -> None:
            wanted = comm.exchange(names)
            copies = self._missing(files, present, wanted)
            if copies:
                transfer(comm, what, copies, path)
            run_together(comm, what, lambda: check_files(path, files, sorted(names)))
            for each in copies:
                present[each.target].add(each.name)

        sizes = {name: checksum.nbytes for name, checksum in files.items()}
        fetch({METADATA_FILE})
        fetch(run_together(comm, what, lambda: files_of_metadata(path, sizes)))
        loaded = load_from(
            comm,
            what,
            path,
            step=step,
            model=self._model,
            optimizer=self._optimizer,
            scaler=self._scaler,
            sizes=sizes,
            fetch=fetch,
        )
        if comm.rank == 0:
            logger.info("goes on from step %d, which was in memory", step)
        return loaded

    def _look(self) -> dict[int, _Found]:
        """Return the steps in this host's folder; on its leader only."""
        found: dict[int, _Found] = {}
        for path in run_directory.complete(self._run) if self._is_leader else ():
            step, files = read_manifest(path)
            here = {
                name
                for name, checksum in files.items()
                if (path / name).is_file() and (path / name).stat().st_size == checksum.nbytes
            }
            found[step] = _Found(files, here)
        return found

    def _missing(
        self,
        files: dict[str, Checksum],
        present: Sequence[set[str]],
        wanted: Sequence[set[str]],
    ) -> list[Transfer]:
        """Return what to copy to the leaders of hosts whose ranks want what is not there."""
        copies = []
        for target in self._leaders():
            ranks = [r for r, leader in enumerate(self._leader_of) if leader == target]
            for name in sorted(set().union(*(wanted[r] for r in ranks)) - present[target]):
                source = next(r for r in self._leaders() if name in present[r])
                copies.append(Transfer(name, files[name].nbytes, source, target))
        return copies

    # - The end

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; and if all went well, remove the folder."""
        super().__exit__(kind, error, traceback)
        if error is None:
            self._flags.exchange(None)  # nobody writes any more
            if self._is_leader:
                shutil.rmtree(self._run, ignore_errors=True)
            self._flags.exchange(None)

    def __enter__(self) -> Standby:
        """Return self."""
        return self


def _find_leaders(comm: Collectives, what: str, folder: Path) -> list[int]:
    """Return for each rank the lowest one that sees the same folder."""
    token = f".here-{uuid.uuid4().hex}"

    def leave() -> str:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
            raise ValueError(f"{folder} is no folder of this user.")
        if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f"others may write to {folder}: chmod 700 it, or name another one.")
        (folder / token).touch()
        return token

    tokens = comm.exchange(run_together(comm, what, leave))
    seen = {position for position, each in enumerate(tokens) if (folder / each).exists()}
    everyone = comm.exchange(min(seen))
    (folder / token).unlink()
    return everyone


def _newest_complete(found: Sequence[dict[int, _Found]]) -> int | None:
    """Return the newest step of which each file is in some folder."""
    for step in sorted({step for each in found for step in each}, reverse=True):
        parts = [each[step] for each in found if step in each]
        files = parts[0].files
        alike = all(part.files == files for part in parts)
        if alike and set(files) <= set().union(*(part.here for part in parts)):
            return step
    return None
