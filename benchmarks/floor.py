"""The plain memory pass that an update is compared with, compiled into a temporary folder."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from belief_dist.kernels.build import FLAGS, compiler
from belief_dist.operands import Operands

_READ, _WRITE, _UPDATE = range(3)  # floor.cpp
BLOCK = 1024  # of which the number of elements must be a multiple


@cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("floor.cpp")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "floor.so"
        subprocess.run([*compiler(), *FLAGS, "-o", str(path), str(source)], check=True)
        library = ctypes.CDLL(str(path))  # stays usable after its file is gone
    library.floor_pass.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.floor_pass.restype = ctypes.c_uint64
    return library


def _streams(operands: Operands) -> list[tuple[Tensor, int]]:
    """Return what an update moves, with the way in which it does.

    The exponents of 8-bit states are left out: one byte for 256.
    """
    access = {"grad": _READ, "param_out": _WRITE}
    return [
        (value, access.get(name, _UPDATE))
        for name, value in operands._asdict().items()
        if isinstance(value, Tensor) and not name.endswith("_exponent")
    ]


def bytes_moved(operands: Operands) -> int:
    """Return the bytes per element that an update reads and writes."""
    return sum(
        tensor.itemsize * (2 if access == _UPDATE else 1) for tensor, access in _streams(operands)
    )


def floor_pass(operands: Operands) -> Callable[[], None]:
    """Return a pass over the memory of an update.

    Raises:
        belief_dist.kernels.build.Unavailable: There is no C++ compiler.
        subprocess.CalledProcessError: The compiler fails.
    """
    library, numel = _library(), operands.param.numel()
    assert numel % BLOCK == 0
    rows = [(t.data_ptr(), t.itemsize, access) for t, access in _streams(operands)]
    table = torch.tensor(rows, dtype=torch.int64)

    def run() -> None:
        library.floor_pass(numel, table.data_ptr(), len(rows), torch.get_num_threads())

    return run
