"""Memory of one process that other processes of its host may map."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from belief_dist.host_memory import forks

# Room for addresses; memory is taken when it is first written to. A process has 128 TiB of them and
# maps as much for every rank of the host and every optimizer.
_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
_ROOM = min(2 * _MEMORY, 1 << 38)
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # since Python 3.13


class FileName(NamedTuple):
    """What another process of the host needs to open a file that has no name.

    Attributes:
        process: Its owner.
        descriptor: In the owner's table.
        device: Of the file, to tell whether the right one was opened.
        inode: Likewise.
    """

    process: int
    descriptor: int
    device: int
    inode: int


class Mapping:
    """A file in memory, mapped into this process as long as a tensor lies in it."""

    def __init__(self, descriptor: int) -> None:
        """Map the file; the descriptor may be closed then.

        Raises:
            OSError: It cannot be mapped: this process may have a limit of addresses.
        """
        size = os.fstat(descriptor).st_size
        self._memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | _NORESERVE)
        # A core of one process shall not hold the memory of all.
        self._memory.madvise(mmap.MADV_DONTDUMP)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """Return a part of the file."""
        return memoryview(self._memory)[offset : offset + nbytes]

    def tensor(self, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a part of the file as a flat tensor."""
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.bytes(offset, numel * dtype.itemsize), dtype=dtype)

    def forget(self, offset: int, nbytes: int) -> None:
        """Give memory back to the system; it reads as zeros then."""
        # It may be closed at the interpreter's end, and a forked child has a copy of its own.
        with contextlib.suppress(ValueError, OSError):
            self._memory.madvise(mmap.MADV_REMOVE, offset, nbytes)


def open_peer(name: FileName) -> Mapping:
    """Map the memory of another process.

    Raises:
        OSError: There is no such process here, it is another user's, or not the one that is meant.
    """
    descriptor = os.open(f"/proc/{name.process}/fd/{name.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        about = os.fstat(descriptor)
        if (about.st_dev, about.st_ino) != (name.device, name.inode):
            raise FileNotFoundError(f"process {name.process} is another one here")
        return Mapping(descriptor)
    finally:
        os.close(descriptor)


class Arena:
    """Hands out tensors in a file in memory, which has no name and ends with its last user.

    Attributes:
        mapping: All of it, as this process sees it.
    """

    def __init__(self) -> None:
        """Make the file.

        Raises:
            OSError: The system has no such files, or this process a limit that forbids it.
        """
        self._descriptor = os.memfd_create("belief_dist", os.MFD_CLOEXEC)
        self._closes = weakref.finalize(self, os.close, self._descriptor)
        self._closes.atexit = False
        os.ftruncate(self._descriptor, _ROOM)
        self.mapping = Mapping(self._descriptor)
        self._end = 0
        self._free: dict[int, list[int]] = {}  # offsets by size

    @property
    def name(self) -> FileName:
        """What peers open it by, until `hide`."""
        about = os.fstat(self._descriptor)
        return FileName(os.getpid(), self._descriptor, about.st_dev, about.st_ino)

    def hide(self) -> None:
        """Let nobody else open it from now on."""
        self._closes()

    def take(self, nbytes: int, *, outlives: bool = False) -> Tensor:
        """Return a flat tensor of bytes, all zero, which comes back when nothing uses it.

        Args:
            nbytes: Its size.
            outlives: It does not come back: peers may still read it when this process has done.

        Raises:
            MemoryError: So many addresses are not left.
        """
        used = max(nbytes, 1)
        size = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
        known = self._free.get(size)
        if known:
            offset = known.pop()
        else:
            if self._end + size > _ROOM:
                raise MemoryError(
                    f"{self._end + size} bytes of parameters and gradients on one rank are more "
                    f"than the {_ROOM} that ranks of a host can share; pass shared_memory=False."
                )
            offset, self._end = self._end, self._end + size
        part = self.mapping.bytes(offset, used)
        # A tensor's storage keeps the memoryview that it was made from.
        if not outlives:
            ends = weakref.finalize(part, self._take_back, self.mapping, self._free, offset, size)
            ends.atexit = False
        forks.note(part, self.mapping.address + offset, size)
        return torch.frombuffer(part, dtype=torch.uint8)[:nbytes]

    def zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what `take` does, as elements of a dtype; `device` is the CPU."""
        return self.take(numel * dtype.itemsize).view(dtype)

    @staticmethod
    def _take_back(mapping: Mapping, free: dict[int, list[int]], offset: int, size: int) -> None:
        mapping.forget(offset, size)
        free.setdefault(size, []).append(offset)

    def offset_of(self, tensor: Tensor) -> int | None:
        """Return where a tensor lies in the file, or None if it lies elsewhere."""
        if tensor.numel() == 0:  # it has no address
            return 0
        offset = tensor.data_ptr() - self.mapping.address
        return offset if 0 <= offset < self._end else None
