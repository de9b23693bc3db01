"""What a step costs in Python: many small parameters, no communication, no arithmetic.

Collectives and the update kernel do nothing here. The floor is the same model with a hook on every
parameter that does nothing. What remains is what a fast device would wait for.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from belief_dist import ShardedAdaBelief, kernels, sharded
from belief_dist.sharding.buffer_pool import Handle
from belief_dist.sharding.collectives import Collectives, Done, ReduceRequest
from benchmarks.engines import BACKWARD, FORWARD, STEP
from benchmarks.report import Result, Row

FLOOR = "hooks that do nothing"
_SIZE = 16  # elements of a parameter
_REPEATS = 5  # steps in each turn
_Train = Callable[[], Iterator[str]]
ZERO = "zero"


class NoCollectives(Collectives):
    """Rank 0 of any number of ranks that all hold what it holds."""

    def __init__(self, world_size: int) -> None:
        super().__init__(None)
        self.world_size = self.num_shards = world_size

    def start_reduce(self, request: ReduceRequest) -> Handle:
        return Done()

    def start_gather(self, flat: Tensor) -> Handle:
        return Done()

    def sum_(self, message: Tensor) -> None:
        message.mul_(self.world_size)

    def broadcast_(self, flat: Tensor) -> None:
        pass

    def exchange(self, value: Any) -> list[Any]:
        return [value] * self.world_size


class _Constant(torch.autograd.Function):
    """Reads all parameters and has ready gradients: backward is autograd's own work alone."""

    @staticmethod
    def forward(ctx: Any, *params: Tensor) -> Tensor:
        ctx.count = len(params)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros(ctx.count, _SIZE).unbind()


class ManyParameters(nn.Module):
    """A model of `count` parameters."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for index in range(count):
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(_SIZE)))

    def forward(self) -> Tensor:
        out: Tensor = _Constant.apply(*self._parameters.values())
        return out


def _train(model: nn.Module, step: Callable[[], Any], zero_grad: Callable[[], Any]) -> _Train:
    def train() -> Iterator[str]:
        zero_grad()
        yield ZERO
        loss = model()
        yield FORWARD
        loss.backward()
        yield BACKWARD
        step()
        yield STEP

    return train


def _hooks(count: int) -> _Train:
    model = ManyParameters(count)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: None)
    return _train(model, lambda: None, model.zero_grad)


def sharded_step(count: int, world_size: int, stage: int) -> _Train:
    """Return a step of `ShardedAdaBelief` on `count` parameters, with collectives that do nothing.

    The caller patches the kernel.
    """
    model = ManyParameters(count)
    with mock.patch.object(sharded, "connect", lambda *_: NoCollectives(world_size)):
        optimizer = ShardedAdaBelief(model.parameters(), stage=stage)
    return _train(model, optimizer.step, optimizer.zero_grad)


def _send_nothing(state, bucket):  # DDP refuses annotations that are strings
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _ddp(count: int, world_size: int) -> _Train:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    model = DistributedDataParallel(ManyParameters(count), gradient_as_bucket_view=True)
    model.register_comm_hook(None, _send_nothing)
    return _train(model, lambda: None, model.zero_grad)


def _contenders(count: int, worlds: Sequence[int]) -> dict[str, Callable[[], _Train]]:
    makers: dict[str, Callable[[], _Train]] = {FLOOR: partial(_hooks, count)}
    for world_size in worlds:
        for stage in (1, 2):
            name = f"ShardedAdaBelief ZeRO-{stage}, {world_size:,} ranks"
            makers[name] = partial(sharded_step, count, world_size, stage)
    makers[f"DDP without an optimizer, {worlds[0]:,} ranks"] = partial(_ddp, count, worlds[0])
    return makers


def run_overhead(count: int, rounds: int) -> Result:
    """Time steps on `count` parameters, `rounds` times in turn."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels, "update_", lambda *_, **__: None))
        steps = {name: make() for name, make in _contenders(count, (4, 1024)).items()}
        if dist.is_initialized():
            stack.callback(dist.destroy_process_group)
        rows = {name: Row(name) for name in steps}
        for number in range(-1, rounds):  # the first one allocates and does not count
            for name, step in steps.items():
                _take_turn(step, rows[name] if number >= 0 else Row(""))
    return Result(
        title="Python per step, without communication and arithmetic",
        settings={"parameters": count, "threads": 1},
        rows=list(rows.values()),
        baselines={},
        beyond=FLOOR,
        notes=["Exposed is the median beyond that of the hooks."],
    )


def settle(step: _Train) -> None:
    """Leave nothing behind for others: a forward reads everything, the next one ends the guard."""
    for _ in range(2):
        next(phase for phase in step() if phase == FORWARD)


def _take_turn(step: _Train, row: Row) -> None:
    gc.collect()
    for _ in range(_REPEATS):
        start = last = time.perf_counter()
        for phase in step():
            now = time.perf_counter()
            row.phases.setdefault(phase, []).append(now - last)
            last = now
        row.seconds.append(time.perf_counter() - start)
    settle(step)
