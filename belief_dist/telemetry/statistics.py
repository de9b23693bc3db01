"""Sums and counts over what this rank holds of each parameter: a record's statistics follow.

Everything is read where it lies, in windows of a few megabytes at most, and written nowhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from belief_dist.operands import Operands, cut
from belief_dist.optimizer import AdaBelief
from belief_dist.rule import Direction, compute_dtype, step_scalars
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.dtensor import local_part
from belief_dist.sharding.norms import UNCLIPPED, norm_of
from belief_dist.state_formats import decode, join_master
from belief_dist.telemetry.quantiles import (
    NUM_BINS,
    PER_OCTAVE,
    SIGNAL,
    SURPRISE,
    Bins,
    stride_of,
)

# Elements at a time, multiples of 256: what stays in the cache of a core, or fills a GPU.
_CPU_WINDOW, _WINDOW = 1 << 15, 1 << 22
# Elements of samples that wait to be counted together; they stay in the cache of a core, too.
_COUNTED_AT_ONCE = 1 << 15


class Held(NamedTuple):
    """What this rank holds of one parameter."""

    group: int  # its param group
    name: str
    step: int  # how many it has taken
    tensors: Operands  # 1-D, equally long; with no elements if this rank has no part of it
    first: int  # where this part starts in the flattened parameter
    whole: int  # elements of the parameter, on all ranks
    has_grad: bool  # `tensors.grad` is the gradient of the last step, multiplied by 1 / `scale`
    scale: float  # by which that step has multiplied it
    mean: float  # by which it would have without clipping
    copies: int  # how many ranks hold the same


class Sums(NamedTuple):
    """Sums over elements; those of several parameters and ranks add up.

    With m' = m / (1 - beta1^t) and s' = s / (1 - beta2^t), the moments without their bias, g the
    gradient as the update took it, and d the direction of the step: what lr is multiplied by.
    """

    numel: float = 0.0
    weight: float = 0.0  # p^2, of the masters
    moment: float = 0.0  # m^2
    second: float = 0.0  # s
    direction: float = 0.0  # d^2
    signal: float = 0.0  # |m'| / (sqrt(s') + eps)
    eps: float = 0.0  # elements of whose s the eps that were added are more than half
    numel_grad: float = 0.0  # elements whose gradient is there
    grad: float = 0.0  # of the mean gradient before its norm was clipped: its square
    surprise: float = 0.0  # (g - m)^2 / s'

    def __add__(self, other: object) -> Sums:
        """Return the sums over the elements of both."""
        assert isinstance(other, Sums)
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))


class Measured(NamedTuple):
    """What is known of some elements; that of several parameters and ranks adds up.

    Attributes:
        sums: Over all of them.
        counts: (2, NUM_BINS), float64, on the CPU: how many have their signal, and their surprise,
            in each bin of `quantiles.SIGNAL` and `quantiles.SURPRISE`.
    """

    sums: Sums
    counts: Tensor

    def __add__(self, other: object) -> Measured:
        """Return what is known of the elements of both."""
        assert isinstance(other, Measured)
        return Measured(self.sums + other.sums, self.counts + other.counts)

    def quantile(self, bins: Bins, share: float) -> float | None:
        """Return a quantile of the signal (`SIGNAL`) or surprise (`SURPRISE`); None of nothing."""
        counts = self.counts[0 if bins is SIGNAL else 1].tolist()
        return bins.quantile(counts, share) if any(counts) else None

    def row(self) -> Tensor:
        """Return all of it as (ROW,), float64."""
        return torch.cat([torch.tensor(self.sums, dtype=torch.float64), self.counts.flatten()])

    @classmethod
    def of_row(cls, row: Tensor) -> Measured:
        """Return what `row` has returned, or a sum of such."""
        sums, counts = row[: len(Sums._fields)], row[len(Sums._fields) :]
        return cls(Sums(*sums.tolist()), counts.view(2, NUM_BINS))


ROW = len(Sums._fields) + 2 * NUM_BINS


def nothing() -> Measured:
    """Return what is known of no elements."""
    return Measured(Sums(), torch.zeros(2, NUM_BINS, dtype=torch.float64))


def held(optimizer: AdaBelief | ShardedAdaBelief) -> Iterator[Held]:
    """Give what this rank holds of each parameter, in the order of the param groups."""
    if isinstance(optimizer, ShardedAdaBelief):
        return _held_sharded(optimizer)
    return _held_plain(optimizer)


def _held_sharded(optimizer: ShardedAdaBelief) -> Iterator[Held]:
    engine = optimizer._engine
    scales = {norm: float(scale) for norm, scale in engine.grad_scales.factors.items()}
    index = 0
    for number, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            yield Held(
                group=number,
                name=_name(group, number, position),
                step=engine.update.states[index]["step"],
                tensors=engine.update.own_part(index),
                first=engine.update.fragment(index).in_param,
                whole=engine.layout.params[index].numel,
                has_grad=param.grad is not None and bool(scales),
                scale=scales.get(norm_of(number, group), 1.0),
                mean=scales.get(UNCLIPPED, 1.0),
                copies=engine.comms[engine.layout.place(index)[0]].num_replicas,
            )
            index += 1


def _held_plain(optimizer: AdaBelief) -> Iterator[Held]:
    for number, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            state = optimizer.state.get(param)
            if not state:  # it has taken no step
                continue
            grad = param.grad
            has_grad = grad is not None and not grad.is_sparse
            # All are laid out alike, or torch copies those of this one parameter.
            tensors: dict[str, Any] = {
                key: local_part(value).detach().reshape(-1)
                for key, value in state.items()
                if key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
            }
            yield Held(
                group=number,
                name=_name(group, number, position),
                step=int(state["step"]),
                tensors=Operands(
                    param=local_part(param).detach().reshape(-1),
                    grad=local_part(grad if has_grad and grad is not None else param)
                    .detach()
                    .reshape(-1),
                    **tensors,
                ),
                first=0,
                whole=local_part(param).numel(),
                has_grad=has_grad,
                scale=1.0,
                mean=1.0,
                copies=1,
            )


def _name(group: Mapping[str, Any], number: int, position: int) -> str:
    names = group.get("param_names")
    return str(names[position]) if names else f"group{number}.{position}"


@torch.no_grad()
def measure(parts: list[Held], param_groups: list[dict[str, Any]]) -> list[Measured]:
    """Return what is known of each of `parts`; waits for the device once.

    Args:
        parts: From `held`.
        param_groups: Of the optimizer.
    """
    raw: defaultdict[torch.device, _Raw] = defaultdict(_Raw)
    # While parameters travel there is a torch function mode, which none of this needs.
    with torch._C.DisableTorchFunction():
        for number, part in enumerate(parts):
            device = part.tensors.exp_avg.device
            window = _CPU_WINDOW if device.type == "cpu" else _WINDOW
            numel = part.tensors.exp_avg.numel() if part.step else 0
            stride = stride_of(part.whole)
            for start in range(0, numel, window):
                operands = part.tensors
                if numel > window:  # else a cut would cost more than what is computed
                    operands = cut(operands, start, min(start + window, numel))
                # The same elements of a parameter, whoever holds them.
                sample = slice(-(part.first + start) % stride, None, stride)
                found = _of_window(part, operands, param_groups[part.group], sample)
                raw[device].add(number, *found)
        totals: dict[int, list[float]] = {}
        counts = torch.zeros(len(parts), 2, NUM_BINS, dtype=torch.float64)
        for each in raw.values():
            each.count()
            for number, row in zip(each.owners, torch.stack(each.sums).tolist(), strict=True):
                before = totals.get(number, [0.0] * len(row))
                totals[number] = [a + b for a, b in zip(before, row, strict=True)]
            for numbers, counted in each.counted:
                counts[numbers] += counted.to("cpu", torch.float64)[..., :NUM_BINS]
        # As many as there are in place of each that was counted.
        counts *= torch.tensor([stride_of(part.whole) for part in parts]).view(-1, 1, 1)
    told = []
    for number, part in enumerate(parts):
        total = totals.get(number)
        sums = Sums() if total is None else _scaled(part, total, param_groups[part.group])
        told.append(Measured(sums, counts[number]))
    return told


class _Raw:
    """What was found on one device and is still there.

    Attributes:
        owners: The part of each window.
        sums: (8,) of each window.
        counted: (parts, 2, NUM_BINS + 1), int64, of these parts.
    """

    def __init__(self) -> None:
        self.owners: list[int] = []
        self.sums: list[Tensor] = []
        self.counted: list[tuple[list[int], Tensor]] = []
        self._samples: list[tuple[int, Tensor, Tensor]] = []  # part, signals, surprises
        self._waiting = 0  # elements of these

    def add(self, number: int, sums: Tensor, signals: Tensor, surprises: Tensor) -> None:
        """Take what was found in a window of part `number`."""
        self.owners.append(number)
        self.sums.append(sums)
        self._samples.append((number, signals, surprises))
        self._waiting += signals.numel()
        if self._waiting > _COUNTED_AT_ONCE:
            self.count()

    def count(self) -> None:
        """Sort the samples of all parts into bins, together: there may be thousands of parts."""
        if not self._samples:
            return
        numbers = sorted({number for number, _, _ in self._samples})
        place = {number: 2 * position for position, number in enumerate(numbers)}
        values, rows, lengths = [], list[int](), list[int]()
        for kind, bins in enumerate((SIGNAL, SURPRISE)):
            tensors = [(signals, surprises)[kind] for _, signals, surprises in self._samples]
            values.append(torch.cat(tensors).log2_().sub_(bins.lowest))
            rows += [place[number] + kind for number, _, _ in self._samples]
            lengths += [tensor.numel() for tensor in tensors]
        scaled = torch.cat(values).mul_(PER_OCTAVE).add_(1).clamp_(0, NUM_BINS - 1)
        # What is not a number has a bin of its own, which nobody reads.
        where = scaled.nan_to_num_(nan=NUM_BINS).long()
        first = torch.tensor(rows) * (NUM_BINS + 1)
        where += torch.repeat_interleave(first, torch.tensor(lengths)).to(where.device)
        counts = torch.zeros(2 * len(numbers) * (NUM_BINS + 1), dtype=torch.int64)
        counts = counts.to(where.device)
        # Not bincount, for which the host would wait for a GPU.
        counts.scatter_add_(0, where, torch.ones_like(where))
        self.counted.append((numbers, counts.view(len(numbers), 2, -1)))
        self._samples.clear()
        self._waiting = 0


def _of_window(
    part: Held, o: Operands, options: Mapping[str, Any], sample: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums over one window, and of a sample of it the signals and the surprises.

    The sums are (8,), and a few lack a factor. Without a gradient there are no surprises.
    """
    scalars = step_scalars({**options, "lr": 1.0}, part.step)
    bias1, bias2 = (1.0 - float(beta) ** part.step for beta in options["betas"])
    compute = compute_dtype(o.param.dtype)
    m = decode(o.exp_avg, o.exp_avg_exponent, signed=True)
    s = decode(o.exp_avg_sq, o.exp_avg_sq_exponent, signed=False)
    weight = (o.param if o.remainder is None else join_master(o.param, o.remainder)).to(compute)
    root = s.sqrt()
    if o.exp_avg_sq_exponent is not None:
        root.clamp_(min=1e-30)  # a code may stand for zero
    if o.max_exp_avg_sq is None:
        denom = root + scalars.eps / scalars.denom_scale
    else:
        largest = decode(o.max_exp_avg_sq, o.max_exp_avg_sq_exponent, signed=False)
        denom = largest.sqrt().add_(scalars.eps / scalars.denom_scale)
    direction = torch.div(m, denom, out=denom)
    # s is what surprise has left plus exactly this much, as eps is added in every step.
    from_eps = scalars.eps * bias2 / scalars.weight2
    sums = [weight.dot(weight), m.dot(m), s.sum(), direction.dot(direction), direction.abs_().sum()]
    signals = direction[sample] * (math.sqrt(bias2) / bias1)
    # In floating point, as torch counts booleans slowly.
    sums.append(torch.lt(s, 2.0 * from_eps, out=direction).sum())
    if not part.has_grad:
        sums += [torch.zeros_like(sums[0])] * 2
        return torch.stack(sums), signals, signals[:0]
    grad = o.grad.to(m.device, compute)
    surprise = torch.sub(m, grad, alpha=part.scale * scalars.sign, out=direction)
    if scalars.coupled_decay:
        surprise.sub_(weight, alpha=scalars.coupled_decay)
    surprise.div_(root)
    sums += [grad.dot(grad), surprise.dot(surprise)]
    return torch.stack(sums), signals, (surprise[sample] * math.sqrt(bias2)).square_()


def _scaled(part: Held, raw: list[float], options: Mapping[str, Any]) -> Sums:
    weight, moment, second, direction, signal, eps, grad, surprise = raw
    scalars = step_scalars({**options, "lr": 1.0}, part.step)
    bias1, bias2 = (1.0 - float(beta) ** part.step for beta in options["betas"])
    if scalars.direction == Direction.ADAPTIVE:
        direction *= (scalars.step_size / scalars.denom_scale) ** 2
    else:
        direction = moment * scalars.step_size**2
        if scalars.direction == Direction.NONE:
            direction = 0.0
    numel = float(part.tensors.exp_avg.numel())
    return Sums(
        numel=numel,
        weight=weight,
        moment=moment,
        second=second,
        direction=direction,
        signal=signal * math.sqrt(bias2) / bias1,
        eps=eps,
        numel_grad=numel if part.has_grad else 0.0,
        grad=grad * part.mean**2,
        surprise=surprise * bias2,
    )
