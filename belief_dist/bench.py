"""Measures the update on this machine beside the speed of its memory.

An update reads and writes each number once and computes little, so memory is what limits it. That
is measured by a pass in place, torch's `neg_`, which does nothing else. On CPUs an update may be
faster than that, as it goes through several tensors at once. Collectives are measured by `doctor`,
on the ranks that it is started with.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from belief_dist import kernels
from belief_dist.figures import new_figure
from belief_dist.options import DEFAULTS
from belief_dist.rule import step_scalars
from belief_dist.sharded import ShardedAdaBelief

_TURNS = 9
_FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, bfloat16 states": (torch.float32, {"state_dtype": "bfloat16"}),
    "float32, 8-bit states": (torch.float32, {"state_dtype": "uint8"}),
    "bfloat16, float32 masters": (torch.bfloat16, {}),
    "bfloat16, remainders": (torch.bfloat16, {"master": "remainder"}),
    "bfloat16, remainders, 8-bit states": (
        torch.bfloat16,
        {"master": "remainder", "state_dtype": "uint8"},
    ),
    "bfloat16, remainders of 8 bits, 8-bit states": (
        torch.bfloat16,
        {"master": "remainder8", "state_dtype": "uint8"},
    ),
}


class Measured(NamedTuple):
    """One form of the update.

    Attributes:
        form: What it works on.
        per_param: Bytes that it moves for each parameter.
        seconds: For each parameter, the fastest of several updates.
        share: Of memory's speed that it reaches.
    """

    form: str
    per_param: float
    seconds: float
    share: float


class Bench(NamedTuple):
    """What was measured.

    Attributes:
        device: On which, and which kernel served.
        elements: Parameters of each update.
        memory: Bytes that a plain pass in place reads and writes in a second.
        updates: Of each form.
    """

    device: str
    elements: int
    memory: float
    updates: list[Measured]


def measure(elements: int, device: torch.device) -> Bench:
    """Measure all forms.

    Args:
        elements: Parameters of an update; far more than caches hold.
        device: Where.
    """
    passed = torch.randn(elements, device=device)
    memory = 2 * passed.nbytes / _seconds(passed.neg_, device)
    del passed
    updates = []
    for name, (dtype, options) in _FORMS.items():
        param = torch.nn.Parameter(torch.randn(elements, device=device).to(dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of training is no news here
            optimizer = ShardedAdaBelief([param], **options)
        operands = optimizer._engine.update.own_part(0)
        operands.grad.normal_(std=1e-2)
        scalars = step_scalars(DEFAULTS, 10)
        tensors = {k: t for k, t in operands._asdict().items() if isinstance(t, Tensor)}
        once = sum(tensors[key].nbytes for key in ("grad", "param_out") if key in tensors)
        moved = 2 * sum(tensor.nbytes for tensor in tensors.values()) - once
        seconds = _seconds(partial(kernels.update_, [operands], scalars), device)
        share = moved / seconds / memory
        updates.append(Measured(name, moved / elements, seconds / elements, share))
    return Bench(f"{device}, {kernels.serving(device)}", elements, memory, updates)


def _seconds(work: Callable[..., object], device: torch.device) -> float:
    times = []
    for turn in range(_TURNS + 2):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= 2:  # compiled, and pages are there
            times.append(time.perf_counter() - begin)
    return min(times)  # what else runs here can only make it slower


def draw_bench(file: Path, bench: Bench) -> None:
    """Write a picture of what was measured, as PNG.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = new_figure(8, 3.5)
    axes = figure.add_subplot()
    forms = [each.form for each in bench.updates]
    times = [each.seconds * 1e9 for each in bench.updates]
    least = [each.per_param / bench.memory * 1e9 for each in bench.updates]
    axes.barh(forms, times, color="#56b4e9", label="the update")
    axes.barh(forms, least, height=0.15, color="#000000", label="a plain pass over its bytes")
    for form, each, place in zip(forms, bench.updates, map(max, times, least), strict=True):
        axes.annotate(
            f"{each.share:.2f}",
            (place, form),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.invert_yaxis()
    axes.set_xlabel("ns for each parameter; behind: share of memory's speed")
    axes.set_title(
        f"The update on {bench.device}; memory: {bench.memory / 1e9:.0f} GB/s",
        loc="left",
        fontsize=10,
    )
    figure.legend(frameon=False, loc="outside lower right", ncols=2, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
