"""Records what the simulation needs: a model without communication, and the machine's speed.

All ranks compute at the same time, so that they share cores and memory as they do in training.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from belief_dist.kernels import checksums, ordered_sum_, update_
from belief_dist.norm import NUM_WORDS
from belief_dist.operands import Operands
from belief_dist.options import DEFAULTS
from belief_dist.rule import step_scalars
from belief_dist.sharding.layout import ParamSpec
from belief_dist.sharding.point_to_point import PointToPoint
from benchmarks import network
from benchmarks.simulation import Device, Profile
from benchmarks.team import Workload
from examples.gpt.model import VOCABULARY, next_byte_loss

_REPEATS = 5
_PINGS = 200
_ELEMENTS = 8 << 20  # per rank, of what the rates are measured on


def specs_of(model: nn.Module, dtype: str) -> list[ParamSpec]:
    """Return what the layout wants to know of a model, as if it were of `dtype`."""
    itemsize = getattr(torch, dtype).itemsize
    return [
        ParamSpec(name, tuple(param.shape), dtype, itemsize, 0)
        for name, param in model.named_parameters()
    ]


def record(work: Workload, namespaces: Sequence[str | None]) -> tuple[Profile, Device, float]:
    """Return the profile, the speeds and the seconds of a small message between two ranks."""
    os.environ["OMP_NUM_THREADS"] = str(work.threads)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_rank_main,
                args=(rank, work, f"file://{folder}/store", namespace, theirs),
                daemon=True,
            )
            for rank, namespace in enumerate(namespaces)
        ]
        for process in processes:
            process.start()
        theirs.close()
        try:
            result: tuple[Profile, Device, float] = ours.recv()
        except EOFError as error:
            raise RuntimeError("a rank that records has failed, see above") from error
        for process in processes:
            process.join()
    return result


def _rank_main(
    rank: int,
    work: Workload,
    store: str,
    namespace: str | None,
    link: multiprocessing.connection.Connection,
) -> None:
    torch.set_num_threads(work.threads)
    if namespace is not None:
        network.enter(namespace)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=work.ranks)
    result = (record_profile(work, dist.barrier), _speeds(work), _latency(rank))
    if rank == 0:
        link.send(result)
    dist.barrier()
    dist.destroy_process_group()


def record_profile(work: Workload, barrier: Callable[[], Any] = lambda: None) -> Profile:
    """Return the median course of forward and backward in this process."""
    model = work.model().to(getattr(torch, work.dtype))
    tokens = torch.randint(VOCABULARY, (work.batch, work.context + 1))
    params = list(model.parameters())
    index = {param: i for i, param in enumerate(params)}
    start = 0.0
    needed, ready = [0.0] * len(params), [0.0] * len(params)

    def before_forward(module: nn.Module, args: Any) -> None:
        for param in module._parameters.values():
            if param is not None:
                needed[index[param]] = time.perf_counter() - start

    def keep(param: nn.Parameter, place: Tensor) -> None:
        place.copy_(param.grad)  # as the engine does
        param.grad = None
        ready[index[param]] = time.perf_counter() - start

    for module in model.modules():
        module.register_forward_pre_hook(before_forward)
    places = [torch.empty_like(param) for param in params]
    for param, place in zip(params, places, strict=True):
        param.register_post_accumulate_grad_hook(lambda p, place=place: keep(p, place))
    courses: list[tuple[float, ...]] = []
    for _ in range(1 + _REPEATS):
        barrier()
        start = time.perf_counter()
        loss = next_byte_loss(model(tokens[:, :-1]), tokens[:, 1:])
        forward, start = time.perf_counter() - start, time.perf_counter()
        loss.backward()
        backward = time.perf_counter() - start
        courses.append((forward, backward, *needed, *ready))
    forward, backward, *times = map(median, zip(*courses[1:], strict=True))
    return Profile(forward, backward, tuple(times[: len(params)]), tuple(times[len(params) :]))


def _speeds(work: Workload) -> Device:
    dtype = getattr(torch, work.dtype)
    shard = _ELEMENTS // work.ranks
    pieces = [torch.randn(shard).to(dtype) for _ in range(work.ranks)]
    total, bins = torch.empty(shard), torch.zeros(NUM_WORDS, dtype=torch.int64)
    seconds = _median_seconds(lambda: ordered_sum_(total, pieces, bins, accumulate=False))
    addends = work.ranks * pieces[0].nbytes
    param, exp_avg, exp_avg_sq = (torch.zeros(shard) for _ in range(3))
    operands = Operands(param, total, exp_avg, exp_avg_sq)
    scalars = step_scalars(DEFAULTS, 1)
    update = _median_seconds(lambda: update_([operands], scalars))
    flat = torch.zeros(_ELEMENTS, dtype=dtype)
    check = _median_seconds(lambda: checksums([flat], [0]))
    return Device(addends / seconds, shard / update, flat.nbytes / check, _send_cost(work))


def _send_cost(work: Workload) -> float:
    """Return the seconds that computing is late for every byte that goes each way."""
    exchange = PointToPoint(dist.group.WORLD)
    flat = torch.zeros(_ELEMENTS)
    used = []
    for _ in range(1 + _REPEATS):
        dist.barrier()
        before = time.process_time()  # of all threads, in the kernel too
        exchange.start_gather(flat).wait()
        used.append(time.process_time() - before)
    sent = flat.nbytes * (work.ranks - 1) / work.ranks
    # Ranks that share a core are late by the work of all of them.
    return median(used[1:]) / sent * max(1.0, work.ranks / len(os.sched_getaffinity(0)))


def _median_seconds(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(1 + _REPEATS):
        dist.barrier()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def _latency(rank: int) -> float:
    """Return half the time of a round trip of 8 bytes between ranks 0 and 1."""
    word = torch.zeros(1, dtype=torch.int64)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(_PINGS):
        if rank == 0:
            dist.send(word, 1)
            dist.recv(word, 1)
        elif rank == 1:
            dist.recv(word, 0)
            dist.send(word, 0)
    seconds = (time.perf_counter() - start) / _PINGS / 2
    dist.barrier()
    return seconds
