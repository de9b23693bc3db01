"""The update alone: how close every form of it comes to the memory traffic it cannot avoid.

Contenders take turns, so that whatever else the machine does slows all of them down. Each has its
own states; those of one form share them with a plain pass over the same memory, their *floor*.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from belief_dist import AdaBelief, kernels
from belief_dist.kernels.build import Unavailable
from belief_dist.operands import BLOCK, Operands
from belief_dist.options import DEFAULTS
from belief_dist.rule import step_scalars, update_reference_
from benchmarks.floor import bytes_moved, floor_pass

ADAMW = "torch AdamW, fused"
OFFICIAL = "official adabelief-pytorch"
OURS = "belief_dist"
_OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
_PER_TIMING = 4 << 20  # elements: a smaller update is repeated, or the clock would not see it
_SLOW_ROUNDS = 3  # of what takes several times as long as the others
_LARGE = 64 << 20  # elements from which memory does not hold all contenders at once

Step = Callable[[], Any]


@dataclass(frozen=True)
class Form:
    """What is stored of an element between two steps."""

    name: str
    param: torch.dtype = torch.float32
    grad: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    remainder: torch.dtype | None = None
    param_out: bool = False  # bfloat16 copies beside float32 masters
    average: torch.dtype | None = None  # of the parameters

    def operands(self, numel: int) -> Operands:
        """Return tensors as after some training."""
        states: dict[str, Tensor] = {}
        for name in ("exp_avg", "exp_avg_sq"):
            if self.state == torch.uint8:
                states[name] = torch.randint(0, 255, (numel,), dtype=torch.uint8)
                states[f"{name}_exponent"] = torch.full(
                    (-(-numel // BLOCK),), 90, dtype=torch.uint8
                )
            else:
                states[name] = torch.full((numel,), 1e-3, dtype=self.state)
        if self.average is not None:
            states["param_ema"] = torch.randn(numel).to(self.average)
        return Operands(
            param=torch.randn(numel).to(self.param),
            grad=(1e-2 * torch.randn(numel)).to(self.grad),
            param_out=torch.zeros(numel, dtype=torch.bfloat16) if self.param_out else None,
            remainder=None if self.remainder is None else torch.zeros(numel, dtype=self.remainder),
            **states,
        )


_BF16, _INT16, _INT8 = torch.bfloat16, torch.int16, torch.int8
FORMS = [
    Form("float32"),
    Form("bfloat16, float32 masters", grad=_BF16, param_out=True),
    Form("bfloat16, remainders", param=_BF16, grad=_BF16, remainder=_INT16),
    Form("bfloat16, remainder8", param=_BF16, grad=_BF16, remainder=_INT8),
    Form("float32, bfloat16 states", state=_BF16),
    Form("float32, 8-bit states", state=torch.uint8),
    Form("bfloat16, remainders, 8-bit states", _BF16, _BF16, torch.uint8, remainder=_INT16),
    Form("bfloat16, remainder8, 8-bit states", _BF16, _BF16, torch.uint8, remainder=_INT8),
    Form("float32, average", average=torch.float32),
    Form("float32, bfloat16 average", average=_BF16),
]


@dataclass
class Contender:
    """Something that updates parameters."""

    name: str
    step: Step
    floor: str | None = None  # the contender whose memory it shares
    nbytes: int | None = None  # per element, that it cannot avoid to move
    rounds: int | None = None  # fewer than the others
    seconds: list[float] = field(default_factory=list)


@dataclass
class Timing:
    """A contender at one size and number of threads."""

    name: str
    elements: int
    threads: int
    floor: str | None
    nbytes: int | None
    seconds: list[float]  # per step

    @property
    def median(self) -> float:
        """Return the median in seconds."""
        return median(self.seconds)


@dataclass
class Updates:
    """All timings, and a sentence for each contender that could not run."""

    timings: list[Timing]
    notes: list[str]


def run_update(sizes: Sequence[int], threads: Sequence[int], rounds: int) -> Updates:
    """Time one update at each size and number of threads.

    Args:
        sizes: Numbers of parameters, multiples of 1,024.
        threads: Of torch.
        rounds: How often each contender runs.
    """
    before = torch.get_num_threads()
    found = Updates([], [])
    for elements in sizes:
        contenders, notes = _contenders(elements)
        found.notes = notes
        for count in threads:
            torch.set_num_threads(count)
            _take_turns(contenders, elements, rounds)
            for each in contenders:
                timing = Timing(each.name, elements, count, each.floor, each.nbytes, each.seconds)
                found.timings.append(timing)
                each.seconds = []
    torch.set_num_threads(before)
    return found


def run_tensors(elements: int, counts: Sequence[int], rounds: int) -> Updates:
    """Time optimizer steps on the same number of parameters in one tensor and in many."""
    contenders = []
    for count in counts:
        params = _params(elements, elements // count)
        for name, make in ((OURS, AdaBelief), (ADAMW, partial(AdamW, fused=True))):
            step = make(params, **_OPTIONS).step
            contenders.append(Contender(f"{name}, {count:,} tensors", step))
    _take_turns(contenders, elements, rounds)
    threads = torch.get_num_threads()
    return Updates(
        [Timing(c.name, elements, threads, None, None, c.seconds) for c in contenders], []
    )


def _take_turns(contenders: Sequence[Contender], elements: int, rounds: int) -> None:
    repeats = max(1, _PER_TIMING // elements)
    for number in range(-1, rounds):  # the first one allocates states and does not count
        for each in contenders:
            if each.rounds is not None and number >= each.rounds:
                continue
            start = time.perf_counter()
            for _ in range(repeats):
                each.step()
            if number >= 0:
                each.seconds.append((time.perf_counter() - start) / repeats)


def _contenders(elements: int) -> tuple[list[Contender], list[str]]:
    """Return what can run here, and one sentence for each contender that cannot."""
    found: list[Contender] = []
    notes: list[str] = []
    scalars = step_scalars({**DEFAULTS, **_OPTIONS}, 100, ema_weight=1e-3)
    for form in FORMS if elements <= _LARGE else FORMS[:1]:
        operands = form.operands(elements)
        nbytes, floor = bytes_moved(operands), f"plain pass: {form.name}"
        try:
            found.append(Contender(floor, floor_pass(operands), floor, nbytes))
        except (Unavailable, subprocess.CalledProcessError) as error:
            notes.append(f"No plain pass: {error}.")
        step = partial(kernels.update_, [operands], scalars)
        found.append(Contender(f"{OURS}: {form.name}", step, floor, nbytes))
    params = _params(elements, elements)
    found.append(Contender(ADAMW, AdamW(params, **_OPTIONS, fused=True).step))
    if elements > _LARGE:
        return found, notes
    found.append(Contender(f"{OURS}: AdaBelief.step", AdaBelief(params, **_OPTIONS).step))
    slow: dict[str, Callable[[], Step]] = {
        f"{OURS}: float32, plain torch": lambda: AdaBelief(params, **_OPTIONS, fused=False).step,
        "torch AdamW, foreach": lambda: AdamW(params, **_OPTIONS, foreach=True).step,
        "torch.compile of the rule": lambda: _compiled(elements),
        "DeepSpeedCPUAdam": lambda: _deepspeed_adam(params),
        OFFICIAL: lambda: official_adabelief(params, **_OPTIONS).step,
        "pytorch_optimizer AdaBelief": lambda: _kozistr(params),
    }
    for name, make in slow.items():
        try:
            found.append(Contender(name, make(), rounds=_SLOW_ROUNDS))
        except Exception as error:  # whatever a foreign package needs and lacks
            notes.append(f"No {name}: {str(error).splitlines()[0]:.100}")
    return found, notes


def _params(elements: int, per_tensor: int) -> list[Tensor]:
    params = [p.requires_grad_() for p in torch.randn(elements).split(per_tensor)]
    grads = (1e-2 * torch.randn(elements)).split(per_tensor)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def _compiled(elements: int) -> Step:
    compiled = torch.compile(update_reference_)
    tensors = FORMS[0].operands(elements)[:4]
    scalars = step_scalars({**DEFAULTS, **_OPTIONS}, 100)
    compiled(*tensors, scalars)
    return lambda: compiled(*tensors, scalars)


def _deepspeed_adam(params: Sequence[Tensor]) -> Step:
    if importlib.util.find_spec("deepspeed") is None:
        raise RuntimeError("deepspeed is not installed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # A build that was killed leaves a lock on which every later one waits for ever.
    os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="belief_dist-benchmark-")
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        step: Step = DeepSpeedCPUAdam(list(params), **_OPTIONS).step
        step()  # compiles
    return step


def official_adabelief(params: Any, **options: Any) -> Optimizer:
    """Return the optimizer of adabelief-pytorch, quiet and with the options of the paper."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from adabelief_pytorch import AdaBelief as Official

        return Official(params, rectify=False, print_change_log=False, **options)


def _kozistr(params: Sequence[Tensor]) -> Step:
    from pytorch_optimizer import AdaBelief as Kozistr

    step: Step = Kozistr(list(params), **_OPTIONS).step
    return step
