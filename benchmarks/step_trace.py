"""One training iteration as torch.profiler sees it, from its Chrome trace."""

from __future__ import annotations

import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from belief_dist import ShardedAdaBelief
from benchmarks.engines import BACKWARD, FORWARD, loss_of
from benchmarks.local_ranks import on_ranks
from benchmarks.team import Workload

_WARM_UP = 4  # steps
_PREFIX = "belief_dist::"
# An iteration of 100 ms or more is drawn 600 pixels wide.
_SHORTEST_US = 50.0

# A range: its name, and start and end in milliseconds since the iteration began.
Range = tuple[str, float, float]


def record_steps(work: Workload, bucket_bytes: int) -> dict[str, list[Range]]:
    """Return the ranges of the first rank in one iteration, by stage.

    Args:
        work: What is trained, and of how many iterations the shortest is told.
        bucket_bytes: As for `ShardedAdaBelief`.
    """
    os.environ["OMP_NUM_THREADS"] = str(work.threads)
    found: dict[str, list[Range]] = on_ranks(work.ranks, _record_stages, work, bucket_bytes)
    return found


def _record_stages(work: Workload, bucket_bytes: int) -> dict[str, list[Range]]:
    stages: tuple[Literal[1, 2], ...] = (1, 2)
    return {f"stage {stage}": _record(work, stage, bucket_bytes) for stage in stages}


def _record(work: Workload, stage: Literal[1, 2], bucket_bytes: int) -> list[Range]:
    model = work.model().to(getattr(torch, work.dtype))
    optimizer = ShardedAdaBelief(
        model.param_groups(), lr=1e-4, stage=stage, bucket_bytes=bucket_bytes
    )
    tokens = work.tokens(dist.get_rank())

    def iteration() -> None:
        with record_function(FORWARD):
            loss = loss_of(model, tokens)
        with record_function(BACKWARD):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(_WARM_UP):
        iteration()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(work.steps + 1):  # of the last one its forward alone
            iteration()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        return ranges_of(json.loads(Path(file.name).read_text()))


def ranges_of(trace: dict[str, Any]) -> list[Range]:
    """Return the phases in a Chrome trace: of the shortest iteration, up to the next forward.

    Phases of the optimizer have the names that it gives them; what takes less than could be drawn
    is left out.
    """
    found = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(_PREFIX))
        for event in trace["traceEvents"]
        if event.get("cat") == "user_annotation"
        and (event["name"].startswith(_PREFIX) or event["name"] in (FORWARD, BACKWARD))
    )
    starts = [start for start, _, name in found if name == FORWARD]
    begin, end = min(pairwise(starts), key=lambda pair: pair[1] - pair[0])
    return [
        (name, round((start - begin) / 1e3, 3), round((stop - begin) / 1e3, 3))
        for start, stop, name in found
        if begin <= start < end and stop - start >= _SHORTEST_US
    ]
