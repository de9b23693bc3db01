"""Ranks whose GPUs are the CPU: kernels are interpreted, memory is that of host processes.

What is real: the processes, the memory that each has mapped of the others, the kernels that read
it and by which ranks meet, and all code of the host. What is not: that a device runs behind it.
The process must have been started with TRITON_INTERPRET=1 and BELIEF_DIST_BACKEND=triton.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from triton._C.libtriton.ir import MEM_SEMANTIC
from triton.runtime.interpreter import InterpreterBuilder

from belief_dist.host_memory import meet
from belief_dist.kernels import triton_kernel
from belief_dist.sharding import symmetric_memory
from belief_dist.sharding.symmetric_memory import Mapped
from tests.harness.device_path import device_path
from tests.harness.interpreter import pytest_configure as interpret_faster

_atomic = InterpreterBuilder.create_atomic_rmw


class HostMemory:
    """What `symmetric_memory.TorchMemory` does, in memory of the host."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        team = meet(dist.get_rank(group), self._exchange, may_share=True)
        assert team is not None
        self._team = team

    def _exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def empty(self, nbytes: int, device: torch.device) -> Tensor:
        return self._team.arena.take(nbytes, outlives=True)

    def share(self, own: Tensor) -> Mapped:
        every = [
            self._team.mapping(rank).tensor(place, own.numel(), torch.uint8)
            for rank, place in enumerate(self._exchange(self._team.arena.offset_of(own)))
        ]
        return Mapped(own, every, self._team)


def _look_and_yield(*args: Any) -> Any:
    """Do what the interpreter does for atomics; what waits for a peer leaves it the core."""
    found = _atomic(*args)
    if MEM_SEMANTIC.ACQUIRE in args:
        time.sleep(0.0005)
    return found


def on_gpus(case: Callable[[], None]) -> None:
    """Run a case on this rank."""
    with ExitStack() as stack:
        interpret_faster()
        stack.enter_context(device_path())
        # Programs without work cost the interpreter as much as a GPU's cost nothing.
        stack.enter_context(patch.object(triton_kernel, "CHUNK_TILES", 1))
        stack.enter_context(patch.object(InterpreterBuilder, "create_atomic_rmw", _look_and_yield))
        stack.enter_context(patch.object(symmetric_memory, "TorchMemory", HostMemory))
        case()
