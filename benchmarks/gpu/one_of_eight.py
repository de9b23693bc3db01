"""The work of one rank of eight on its own GPU: a copy stands in the place of each collective.

What it shows is everything but the network: sums of eight pieces, the update of an eighth, the
messages between. The gradients of the seven others are this rank's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from belief_dist import sharded
from belief_dist.sharding.buffer_pool import Handle
from belief_dist.sharding.collectives import AllToAll, Done, ReduceRequest
from benchmarks.gpu.cases import Case, Outcome, Size
from benchmarks.gpu.contenders import SMALLEST
from benchmarks.gpu.contenders import sharded as contend
from benchmarks.gpu.step import measure, title

RANKS = 8


class Alone(AllToAll):
    """Rank 0 of several, of which no other exists."""

    def __init__(self, ranks: int) -> None:
        super().__init__(None)
        self.world_size = self.num_shards = ranks

    @property
    def members(self) -> list[int]:
        return list(range(self.world_size))

    def start_reduce(self, request: ReduceRequest) -> Handle:
        """Copy what is sent to where it would arrive, and sum it as `AllToAll` does."""
        flat = request.flat
        inbox = self._inboxes.take(flat.numel(), flat.dtype, flat.device)
        inbox.copy_(flat)
        pieces = list(inbox.view(self.num_shards, -1))
        return self._inboxes.lend(_Sum(request, pieces), inbox)

    def start_gather(self, flat: Tensor) -> Handle:
        """Read and write all of `flat`, which stays as it is."""
        flat.view(torch.int64).bitwise_or_(0)
        return Done()

    def sum_(self, message: Tensor) -> None:
        message.mul_(self.world_size)

    def broadcast_(self, flat: Tensor) -> None:
        pass

    def exchange(self, value: Any) -> list[Any]:
        return [value] * self.world_size


class _Sum:
    """Pieces that have arrived, and are added when the sum is asked for."""

    def __init__(self, request: ReduceRequest, pieces: list[Tensor]) -> None:
        self._request, self._pieces = request, pieces

    def wait(self) -> None:
        self._request.add_(self._pieces)


@contextmanager
def alone(ranks: int = RANKS) -> Iterator[None]:
    """Inside, optimizers that are built take themselves for rank 0 of `ranks`."""
    connect = sharded.connect
    sharded.connect = lambda *arguments: Alone(ranks)  # type: ignore[assignment]
    try:
        yield
    finally:
        sharded.connect = connect


def _measure(device: str, size: Size, dtype: torch.dtype, options: dict[str, Any]) -> Outcome:
    with alone():
        return measure(partial(contend, **options), device, size, dtype)


def cases(device: str, size: Size) -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    rows: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
        "bfloat16, fp32 masters": (bf16, {}),
        "bfloat16, clipping": (bf16, {"max_grad_norm": 1.0}),
        "bfloat16, no replica check": (bf16, {"check_replicas": False}),
        "bfloat16, stage 2": (bf16, {"stage": 2}),
        "bfloat16, remainder, 8-bit states": (bf16, SMALLEST),
        "bfloat16, remainder, 8-bit states, stage 2": (bf16, {**SMALLEST, "stage": 2}),
        "bfloat16, offload": (bf16, {"offload": "cpu"}),
        "float32": (fp32, {}),
        "float32, bfloat16 sent": (fp32, {"reduce_dtype": "bfloat16"}),
        "float32, int8 sent": (fp32, {"reduce_dtype": "int8"}),
    }
    table = f"As rank 0 of {RANKS}: {title(size).replace('bfloat16, ', '')}"
    return [
        Case(table, name, partial(_measure, device, size, dtype, options))
        for name, (dtype, options) in rows.items()
    ]
