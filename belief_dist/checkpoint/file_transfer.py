"""Copies files between the hosts of a job, through its process group."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist.checkpoint.errors import run_together
from belief_dist.sharding.collectives import Collectives

_PIECE = 16 << 20  # bytes that are on their way at once, of each file


class Transfer(NamedTuple):
    """A file that one rank reads and another one writes."""

    name: str
    nbytes: int
    source: int  # a rank of the group
    target: int


def transfer(comm: Collectives, what: str, transfers: Sequence[Transfer], folder: Path) -> None:
    """Copy files, piece by piece, all of them at once; called by all ranks with the same list.

    A file has its name when all of it is there.

    Args:
        comm: Of a backend that sends CPU tensors.
        what: Start of an error's message.
        transfers: What to copy.
        folder: Where this rank reads and writes.

    Raises:
        CheckpointError: On every rank: some file cannot be read or written.
    """
    own = _OwnPart(comm, transfers, folder)
    largest = max((each.nbytes for each in transfers), default=0)
    for begin in range(0, largest, _PIECE):
        own.copy(begin)
    run_together(comm, what, own.close)


class _OwnPart:
    """The files that this rank reads or writes.

    Where that fails, it goes on to send and receive, as the others wait for it, and tells at last.
    """

    def __init__(self, comm: Collectives, transfers: Sequence[Transfer], folder: Path) -> None:
        self._group = comm.group
        self._folder = folder
        self._outgoing = [each for each in transfers if each.source == comm.rank]
        self._incoming = [each for each in transfers if each.target == comm.rank]
        self._files: dict[Path, Any] = {}
        self._problem: OSError | None = None

    def copy(self, begin: int) -> None:
        """Copy the piece of every file that starts at byte `begin`."""
        works, arriving = [], []
        for each in self._incoming:
            if begin < each.nbytes:
                buffer = torch.empty(min(_PIECE, each.nbytes - begin), dtype=torch.uint8)
                works.append(dist.irecv(buffer, self._peer(each.source), group=self._group))
                arriving.append((each, buffer))
        for each in self._outgoing:
            if begin < each.nbytes:
                buffer = torch.zeros(min(_PIECE, each.nbytes - begin), dtype=torch.uint8)
                self._try(partial(self._read, each, begin, buffer))
                works.append(dist.isend(buffer, self._peer(each.target), group=self._group))
        for work in works:
            assert work is not None
            work.wait()
        for each, buffer in arriving:
            self._try(partial(self._write, each, buffer))

    def _peer(self, rank: int) -> int:
        assert self._group is not None
        return dist.get_global_rank(self._group, rank)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self._problem = self._problem or error

    def _open(self, path: Path, mode: str) -> Any:
        if path not in self._files:
            self._files[path] = open(path, mode, buffering=0)
        return self._files[path]

    def _read(self, each: Transfer, begin: int, buffer: Tensor) -> None:
        file = self._open(self._folder / each.name, "rb")
        file.seek(begin)  # one file may go to several ranks
        if file.readinto(buffer.numpy().data) != buffer.numel():
            raise OSError(f"{self._folder / each.name} is shorter than it was")

    def _write(self, each: Transfer, buffer: Tensor) -> None:
        view = buffer.numpy().data
        file = self._open(self._partial(each), "wb")
        while view:
            view = view[file.write(view) :]

    def _partial(self, each: Transfer) -> Path:
        return self._folder / f".{each.name}.part"

    def close(self) -> None:
        """Give the files that have arrived their names.

        Raises:
            OSError: Some file could not be read or written.
        """
        for file in self._files.values():
            file.close()
        if self._problem is not None:
            raise self._problem
        for each in self._incoming:
            if each.nbytes == 0:
                self._partial(each).touch()
            os.replace(self._partial(each), self._folder / each.name)
