"""How far smaller states lead a parameter astray: every mode against the rule in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from belief_dist import kernels
from belief_dist import state_formats as storage
from belief_dist.operands import BLOCK, Operands
from belief_dist.options import DEFAULTS
from belief_dist.rule import step_scalars
from benchmarks.gradients import Source

_FEWEST = 20  # elements that quantiles of a bin are taken of


@dataclass(frozen=True)
class Mode:
    """What is kept between two steps."""

    param: torch.dtype = torch.float32  # of what is updated
    state: torch.dtype = torch.float32
    remainder: torch.dtype | None = None
    param_out: bool = False  # bfloat16 parameters beside their float32 masters
    # Controls: bfloat16 states, and masters of 24 bits, but without noise.
    to_nearest: bool = False
    master_to_nearest: bool = False


_BF16, _INT16, _INT8 = torch.bfloat16, torch.int16, torch.int8
EXACT = Mode(torch.float64, torch.float64)
MODES = {
    "float32": Mode(),
    "bf16 params, float32 masters": Mode(param_out=True),
    "bf16 params, remainders": Mode(_BF16, remainder=_INT16),
    "bf16 params, remainder8": Mode(_BF16, remainder=_INT8),
    "bf16 states": Mode(state=_BF16),
    "8-bit states": Mode(state=torch.uint8),
    "remainders, 8-bit states": Mode(_BF16, torch.uint8, remainder=_INT16),
    "remainder8, 8-bit states": Mode(_BF16, torch.uint8, remainder=_INT8),
    "control: bf16 states to nearest": Mode(to_nearest=True),
    "control: remainder8 to nearest": Mode(_BF16, remainder=_INT16, master_to_nearest=True),
    "control: bf16 params alone": Mode(_BF16),
}


class Contender:
    """The parameters of a source, as one mode keeps them."""

    def __init__(self, mode: Mode, start: Sequence[Tensor]) -> None:
        self._mode = mode
        self._start = torch.cat(list(start)).double()
        self._work = [self._operands(number, each) for number, each in enumerate(start)]

    def _operands(self, number: int, start: Tensor) -> Operands:
        mode, count = self._mode, start.numel()
        states = {name: torch.zeros(count, dtype=mode.state) for name in ("exp_avg", "exp_avg_sq")}
        if mode.state == torch.uint8:
            for name in list(states):
                states[f"{name}_exponent"] = torch.zeros(-(-count // BLOCK), dtype=torch.uint8)
        param, remainder = start.to(mode.param, copy=True), None
        if mode.remainder == _INT16:
            param, remainder = storage.split_master(start)
        elif mode.remainder == _INT8:
            param, remainder = storage.split_rounded_master(start, storage.NEAREST8)
        return Operands(
            param=param,
            grad=start,  # until a step brings its own
            param_out=torch.zeros(count, dtype=torch.bfloat16) if mode.param_out else None,
            remainder=remainder,
            key=storage.noise_key(0, number),
            **states,
        )

    def step(self, grads: Sequence[Tensor], options: dict[str, Any], number: int) -> None:
        """Apply step `number` with the library's own kernels."""
        work = [
            own._replace(grad=grad.contiguous())
            for own, grad in zip(self._work, grads, strict=True)
        ]
        kernels.update_(work, step_scalars(options, number))
        if self._mode.to_nearest:
            for own in work:
                for state in (own.exp_avg, own.exp_avg_sq):
                    state.copy_(state.bfloat16())
        if self._mode.master_to_nearest:
            for own in work:
                assert own.remainder is not None
                master = storage.join_master(own.param, own.remainder)
                upper, rest = storage.split_rounded_master(master, storage.NEAREST8)
                own.param.copy_(upper)
                own.remainder.copy_(rest).mul_(1 << 8)

    def values(self) -> dict[str, Tensor]:
        """Return how far all parameters have come, m and s: each (elements,), float64."""
        found: dict[str, list[Tensor]] = {"update": [], "m": [], "s": []}
        for own in self._work:
            param = own.param
            if own.remainder is not None:
                param = storage.join_master(param, own.remainder)
            found["update"].append(param)
            m, s = own.exp_avg, own.exp_avg_sq
            if own.exp_avg_exponent is not None and own.exp_avg_sq_exponent is not None:
                m = storage.decode_m(m, own.exp_avg_exponent)
                s = storage.decode_s(s, own.exp_avg_sq_exponent)
            found["m"].append(m)
            found["s"].append(s)
        flat = {name: torch.cat(each).double() for name, each in found.items()}
        flat["update"] -= self._start
        return flat


@dataclass(frozen=True)
class Spread:
    """Quantiles over elements."""

    median: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """Return those of (n,) numbers, n > 0."""
        ordered = values.sort().values
        at = [ordered[round(q * (len(ordered) - 1))].item() for q in (0.5, 0.9, 0.99, 1.0)]
        return cls(*at)


@dataclass
class Errors:
    """Relative errors of one mode, and where along their exact way its parameters have come."""

    update: Spread
    m: Spread
    s: Spread
    way: float  # median of update / exact update
    by_scale: dict[float, Spread]  # of the update, by power of ten of the gradient's size
    by_noise: dict[float, Spread]  # likewise, by standard deviation over mean


@dataclass
class Case:
    """All modes on one source of gradients."""

    title: str
    settings: dict[str, Any]
    rows: dict[str, Errors] = field(default_factory=dict)


def measure(source: Source, modes: dict[str, Mode] = MODES) -> Case:
    """Run all modes side by side on the same gradients."""
    options = {**DEFAULTS, **source.options}
    exact = Contender(EXACT, source.start)
    contenders = {name: Contender(mode, source.start) for name, mode in modes.items()}
    for step in range(1, source.steps + 1):
        grads = source.draw(step)
        for contender in (exact, *contenders.values()):
            contender.step(grads, options, step)
    truth = exact.values()
    # What has never had a gradient says nothing about states.
    counts = (source.scale > 0) & (truth["update"] != 0) & (truth["m"] != 0)
    about = {"elements": int(counts.sum()), "steps": source.steps, "eps": options["eps"]}
    case = Case(source.title, {**about, **source.options})
    scale = source.scale[counts].log10().floor()
    noise = None if source.noise is None else source.noise[counts].log10().mul(2).floor() / 2
    for name, contender in contenders.items():
        found = contender.values()
        error = {
            kind: (found[kind] / exactly - 1)[counts].abs().nan_to_num(torch.inf)
            for kind, exactly in truth.items()
        }
        case.rows[name] = Errors(
            **{kind: Spread.of(each) for kind, each in error.items()},
            way=Spread.of((found["update"] / truth["update"])[counts]).median,
            by_scale=_by(scale, error["update"]),
            by_noise={} if noise is None else _by(noise, error["update"]),
        )
    return case


def _by(bins: Tensor, error: Tensor) -> dict[float, Spread]:
    return {
        each.item(): Spread.of(error[bins == each])
        for each in bins.unique()
        if (bins == each).sum() >= _FEWEST
    }
