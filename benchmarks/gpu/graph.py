"""Captured CUDA graphs: of an update, and of whole iterations, against the same uncaptured.

On a CPU, for tests, a replay is a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from belief_dist import AdaBelief, ShardedAdaBelief, kernels
from belief_dist.device_scalars import device_scalars
from belief_dist.state_formats import update_stored_reference_
from benchmarks.gpu.cases import SAME, Case, Outcome, Size
from benchmarks.gpu.contenders import OPTIONS, Contender
from benchmarks.gpu.forms import FORMS, make, moved, same
from benchmarks.gpu.forms import OPTIONS as RULE
from benchmarks.gpu.timing import median

_WARM, _REPLAYS = 3, 10


@contextmanager
def before_capture(device: str) -> Iterator[None]:
    """Run on another stream, as must what comes before a capture."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Return what replays a run. Capturing runs nothing."""
    if device == "cpu":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _update(form: str, device: str, size: Size) -> Outcome:
    """Replay one update whose step and learning rate are on the device."""
    work = [make(FORMS[form], size.bits // 10, device) for _ in range(3)]
    step = torch.ones((), dtype=torch.int64, device=device)
    lr = torch.full((), 1e-3, dtype=torch.float64, device=device)
    scale = torch.full((), 0.5, dtype=torch.float64, device=device)
    with before_capture(device):  # compiles, and uploads the table
        kernels.update_(work, device_scalars(RULE, step, lr), grad_scale=scale, fused=True)
    here = [moved(operands, "cpu") for operands in work]

    def run() -> None:
        step.add_(1)
        kernels.update_(work, device_scalars(RULE, step, lr), grad_scale=scale, fused=True)

    replay = capture(run, device)
    for number in range(5):
        lr.fill_(1e-3 / (number + 1))
        replay()
        (scalars,) = device_scalars(RULE, step, lr).on_host()
        for operands in here:
            update_stored_reference_(operands, scalars, grad_scale=0.5)
    good = int(step) == 6 and all(same(a, b) for a, b in zip(work, here, strict=True))
    return {"replays": 5, SAME: good}


def _iteration(kind: Callable[..., Any], device: str, size: Size) -> Outcome:
    """Replay whole iterations, and compare with an optimizer that runs them one by one."""
    contenders = []
    for _ in range(2):
        model = size.job.model(torch.float32, device)
        contenders.append(Contender(model, kind(model.parameters(), **OPTIONS)))
    captured, plain = contenders
    tokens = size.job.tokens(device)
    with before_capture(device):
        for _ in range(_WARM):
            captured.iterate(tokens)
    captured.zero_grad()

    def iterate() -> None:
        captured.zero_grad()
        captured.backward(tokens)
        captured.step()

    replay = capture(iterate, device)
    for _ in range(_REPLAYS):
        replay()
    for _ in range(_WARM + _REPLAYS):
        plain.iterate(tokens)
    pairs = zip(captured.module.parameters(), plain.module.parameters(), strict=True)
    good = all(torch.equal(a, b) for a, b in pairs)
    replayed = median(replay, device, size.rounds)
    uncaptured = median(partial(plain.iterate, tokens), device, size.rounds)
    times = {"replay ms": replayed.total, "uncaptured ms": uncaptured.total}
    return {"replays": _REPLAYS, SAME: good, **times}


def cases(device: str, size: Size) -> list[Case]:
    here = {"device": device, "size": size}
    capturable = partial(AdaBelief, capturable=True)
    forms = ("float32", "masters, 8-bit states", "remainder, bfloat16 states")
    found = [Case("One update, captured", form, partial(_update, form, **here)) for form in forms]
    whole = "A whole iteration, captured"
    found.append(Case(whole, "AdaBelief(capturable=True)", partial(_iteration, capturable, **here)))
    for name, options in {
        "ShardedAdaBelief": {},
        "ShardedAdaBelief, stage 2": {"stage": 2},
        "ShardedAdaBelief, clipping": {"max_grad_norm": 1.0},
    }.items():
        run = partial(_iteration, partial(ShardedAdaBelief, **options), **here)
        found.append(Case(whole, name, run))
    return found
