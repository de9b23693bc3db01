"""Training steps in turns with those of AdamW, so that a slow moment of the machine hits both.

Three ways to run an iteration: as it is, where a slow host hides much of what a GPU does; with so
large a batch that the GPU is what is waited for; and captured in a CUDA graph, without the host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import AdamW

from belief_dist import AdaBelief
from benchmarks.gpu.cases import Case, Outcome, Size
from benchmarks.gpu.contenders import SMALLEST, Contender, Maker, plain
from benchmarks.gpu.contenders import sharded as contend
from benchmarks.gpu.graph import before_capture, capture
from benchmarks.gpu.one_of_eight import alone
from benchmarks.gpu.step import title
from benchmarks.gpu.timing import time_once

_WARM = 3
_LARGER = 4  # times the batch


def _in_turns(
    ours: Callable[[], Any], theirs: Callable[[], Any], device: str, rounds: int
) -> Outcome:
    """Return the medians of both, and of their ratios."""
    times = []
    for number in range(-_WARM, rounds):
        # The one that begins changes, as what a step leaves in a cache serves the next.
        order = (ours, theirs) if number % 2 else (theirs, ours)
        taken = {run: time_once(run, device).total for run in order}
        if number >= 0:
            times.append((taken[ours], taken[theirs]))
    mine, other = zip(*times, strict=True)
    return {
        "ours ms": statistics.median(mine),
        "AdamW ms": statistics.median(other),
        "ratio": statistics.median(a / b for a, b in times),
    }


def _iteration(contender: Contender, tokens: torch.Tensor, device: str, captured: bool) -> Any:
    run = partial(contender.iterate, tokens)
    if not captured:
        return run
    with before_capture(device):
        for _ in range(_WARM):
            run()
    contender.zero_grad()
    return capture(run, device)


def _measure(make: Maker, device: str, size: Size, *, batch: int, captured: bool) -> Outcome:
    tokens = size.step._replace(batch=batch * size.step.batch).tokens(device)
    adamw = partial(AdamW, fused=True, capturable=captured and device == "cuda")
    contenders = [
        maker(size.step.model(torch.bfloat16, device), device)
        for maker in (make, partial(plain, make=adamw))
    ]
    # A captured graph holds addresses alone: the list keeps what lies there.
    runs = [_iteration(each, tokens, device, captured) for each in contenders]
    return _in_turns(*runs, device, size.rounds)


def _as_one_of_eight(model: Any, device: str, **options: Any) -> Contender:
    with alone():
        return contend(model, device, **options)


def cases(device: str, size: Size) -> list[Case]:
    rows: dict[str, Maker] = {
        "ShardedAdaBelief, fp32 masters": contend,
        "ShardedAdaBelief, clipping": partial(contend, max_grad_norm=1.0),
        "ShardedAdaBelief, remainder, 8-bit states": partial(contend, **SMALLEST),
        "... as rank 0 of 8, fp32 masters": _as_one_of_eight,
    }
    kinds = {
        "as it is": {"batch": 1, "captured": False},
        f"{_LARGER} times the batch": {"batch": _LARGER, "captured": False},
        "captured": {"batch": 1, "captured": True},
    }
    found = []
    for kind, how in kinds.items():
        table = f"{title(size)}; all AdamW in bfloat16, fused: {kind}"
        each = dict(rows)
        if how["captured"]:
            each["AdaBelief(capturable=True)"] = partial(
                plain, make=partial(AdaBelief, capturable=True)
            )
            del each["... as rank 0 of 8, fp32 masters"]  # its copies are no collectives
        for name, make in each.items():
            run = partial(_measure, make, device, size, **how)  # type: ignore[arg-type]
            found.append(Case(table, f"{name}: {kind}", run))
    return found
