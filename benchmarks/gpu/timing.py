"""How long something takes: on the GPU by events, on the host, and in which kernels.

On a CPU, for tests, time.perf_counter stands in the place of events, and there are no kernels.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# For which the GPU is kept busy, so that the host has issued what is timed before it begins.
_AHEAD_CYCLES = 3_000_000


class Taken(NamedTuple):
    """Milliseconds: until all of it has run, and until the host has issued all of it."""

    total: float
    host: float


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_once(run: Callable[[], Any], device: str, *, ahead: bool = False) -> Taken:
    """Time one run.

    Args:
        run: What is timed.
        device: "cuda" or "cpu".
        ahead: Give the host a start, so that its own time does not count in `total`.
    """
    if device == "cpu":
        begin = time.perf_counter()
        run()
        taken = (time.perf_counter() - begin) * 1e3
        return Taken(taken, taken)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if ahead:
        torch.cuda._sleep(_AHEAD_CYCLES)
    begin = time.perf_counter()
    start.record()
    run()
    end.record()
    host = (time.perf_counter() - begin) * 1e3
    end.synchronize()
    return Taken(start.elapsed_time(end), host)


def median(
    run: Callable[[], Any],
    device: str,
    rounds: int,
    *,
    before: Callable[[], Any] = lambda: None,
    warm: int = 3,
    ahead: bool = False,
) -> Taken:
    """Return the medians of several runs, each after `before`, which does not count."""
    taken = []
    for number in range(-warm, rounds):
        before()
        once = time_once(run, device, ahead=ahead)
        if number >= 0:
            taken.append(once)
    totals, hosts = zip(*taken, strict=True)
    return Taken(statistics.median(totals), statistics.median(hosts))


def kernels_of(run: Callable[[], Any], device: str) -> tuple[int, float]:
    """Return how many kernels and copies a run starts on the GPU, and their milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    synchronize(device)
    with profile(activities=activities) as profiler:
        run()
        synchronize(device)
    count, busy = 0, 0.0
    for event in profiler.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not getattr(event, "is_user_annotation", False):
            count += event.count
            busy += event.self_device_time_total / 1e3
    return count, busy


def synchronizing(run: Callable[[], Any], device: str) -> str:
    """Return where a run makes the host wait for the GPU: "none", or the first place.

    torch sees its own calls; a library's event that is waited for it does not.
    """
    if device == "cpu":
        run()
        return "no GPU"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        places = traceback.extract_tb(error.__traceback__)
        return " < ".join(f"{p.filename.rsplit('/', 1)[-1]}:{p.lineno}" for p in places[:-4:-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


class Memory:
    """What is allocated on the GPU beyond what was when it was made."""

    def __init__(self, device: str) -> None:
        self._device = device
        synchronize(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated() if device == "cuda" else 0

    def peak(self) -> int | None:
        """Return the most bytes; None without a GPU."""
        if self._device == "cpu":
            return None
        return torch.cuda.max_memory_allocated() - self._before

    def held(self) -> int | None:
        """Return the bytes that are allocated now; None without a GPU."""
        if self._device == "cpu":
            return None
        return torch.cuda.memory_allocated() - self._before
