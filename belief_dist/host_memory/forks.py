"""A forked child gets a copy of shared memory, as it does of all other memory.

Otherwise a worker that was forked to evaluate or to save a model would see its parameters change
while it reads them, and a change of its own would reach the parent. The parent goes on when the
child has made its copy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

_REMAP_MAYMOVE, _REMAP_FIXED = 1, 2

# Address and bytes of what is in use, by the identity of the view that ends with it.
_in_use: dict[int, tuple[int, int]] = {}
_pipes: list[tuple[int, int]] = []


def note(view: memoryview, address: int, nbytes: int) -> None:
    """Have children copy `nbytes` at `address`, as long as `view` lives."""
    key = id(view)
    _in_use[key] = (address, nbytes)
    weakref.finalize(view, _in_use.pop, key, None).atexit = False


def _before() -> None:
    if _in_use:
        _pipes.append(os.pipe())


def _in_parent() -> None:
    if _pipes:
        reads, writes = _pipes.pop()
        os.close(writes)
        os.read(reads, 1)  # nothing comes: the child closes its end, or ends
        os.close(reads)


def _in_child() -> None:
    if _pipes:
        reads, writes = _pipes.pop()
        for address, nbytes in _in_use.values():
            _replace_by_copy(address, nbytes)
        _in_use.clear()
        os.close(reads)
        os.close(writes)


def _replace_by_copy(address: int, nbytes: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    copy = libc.mmap(
        None, size(nbytes), protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, size(0)
    )
    failed = pointer(-1).value
    if copy != failed:
        ctypes.memmove(copy, address, nbytes)
        moved = _REMAP_MAYMOVE | _REMAP_FIXED
        copy = libc.mremap(pointer(copy), size(nbytes), size(nbytes), moved, pointer(address))
    if copy == failed:
        # Going on would train the parent's parameters from here.
        os.write(2, b"belief_dist: a forked child has no memory for a copy of the parameters\n")
        os._exit(1)


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
