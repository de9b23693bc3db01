"""The update alone: how close the fused kernel comes to the memory traffic it cannot avoid.

All contenders work on the same parameters and gradients, cut into the same tensors; each has its
own states. They take turns, so that whatever else the machine does slows all of them down.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from belief_dist import AdaBelief
from belief_dist.kernels import require_fused
from belief_dist.kernels.build import Unavailable
from benchmarks.floor import compile_floor
from benchmarks.report import Result, Row

FLOOR = "plain pass"
ADAMW_FUSED = "torch AdamW fused"
OFFICIAL = "official AdaBelief"
_OFFICIAL_ROUNDS = 3  # several times slower than the others

Step = Callable[[], Any]


def run_update(elements: int, tensor_elements: int, rounds: int, threads: int | None) -> Result:
    """Time one optimizer step on float32 parameters.

    Args:
        elements: Number of parameters.
        tensor_elements: Size of the tensors that they are cut into.
        rounds: How often each contender runs.
        threads: Of torch; None leaves torch's own choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    params = [p.requires_grad_() for p in torch.randn(elements).split(tensor_elements)]
    grads = (1e-2 * torch.randn(elements)).split(tensor_elements)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    steps, notes = _contenders(params)
    rows = {name: Row(name) for name in steps}
    for number in range(-1, rounds):  # the first one allocates states and does not count
        for name, step in steps.items():
            if name == OFFICIAL and number >= _OFFICIAL_ROUNDS:
                continue
            start = time.perf_counter()
            step()
            if number >= 0:
                rows[name].seconds.append(time.perf_counter() - start)
    return Result(
        title="One optimizer step in one process",
        settings={
            "float32 parameters": f"{elements / 2**20:g} Mi",
            "tensors": len(params),
            "threads": torch.get_num_threads(),
        },
        rows=list(rows.values()),
        baselines={FLOOR: "pass", ADAMW_FUSED: "AdamW"},
        notes=notes,
    )


def _contenders(params: Sequence[Tensor]) -> tuple[dict[str, Step], list[str]]:
    """Return what can run here, and one sentence for each contender that cannot."""
    options: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
    steps: dict[str, Step] = {}
    notes: list[str] = []
    try:
        steps[FLOOR] = _floor_step(params)
    except (Unavailable, subprocess.CalledProcessError) as error:
        notes.append(f"No {FLOOR}: {error}.")
    try:
        require_fused()
        steps["belief_dist C++"] = AdaBelief(params, **options, fused=True).step
    except RuntimeError as error:
        notes.append(f"No belief_dist C++: {error}")
    steps["belief_dist plain torch"] = AdaBelief(params, **options, fused=False).step
    steps[ADAMW_FUSED] = AdamW(params, **options, fused=True).step
    steps["torch AdamW foreach"] = AdamW(params, **options, foreach=True).step
    if importlib.util.find_spec("adabelief_pytorch"):
        steps[OFFICIAL] = official_adabelief(params, **options).step
    else:
        notes.append(f"No {OFFICIAL}: adabelief-pytorch is not installed.")
    return steps, notes


def _floor_step(params: Sequence[Tensor]) -> Step:
    floor_pass = compile_floor()
    states = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]

    def step() -> None:
        for param, (exp_avg, exp_avg_sq) in zip(params, states, strict=True):
            assert param.grad is not None
            floor_pass(param, param.grad, exp_avg, exp_avg_sq)

    return step


def official_adabelief(params: Any, **options: Any) -> Optimizer:
    """Return the optimizer of adabelief-pytorch, quiet and with the options of the paper."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from adabelief_pytorch import AdaBelief as Official

        return Official(params, rectify=False, print_change_log=False, **options)
