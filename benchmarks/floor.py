"""The plain memory pass that an update is compared with, compiled into a temporary folder."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from belief_dist.kernels.build import FLAGS, compiler

FloorPass = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def compile_floor() -> FloorPass:
    """Return the pass over (param, grad, exp_avg, exp_avg_sq), all float32 and contiguous.

    Raises:
        belief_dist.kernels.build.Unavailable: There is no C++ compiler.
        subprocess.CalledProcessError: The compiler fails.
    """
    source = Path(__file__).with_name("floor.cpp")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "floor.so"
        subprocess.run([*compiler(), *FLAGS, "-o", str(path), str(source)], check=True)
        library = ctypes.CDLL(str(path))  # stays usable after its file is gone
    library.floor_pass.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 4, ctypes.c_int]
    library.floor_pass.restype = None

    def run(*tensors: Tensor) -> None:
        addresses = [tensor.data_ptr() for tensor in tensors]
        library.floor_pass(tensors[0].numel(), *addresses, torch.get_num_threads())

    return run
