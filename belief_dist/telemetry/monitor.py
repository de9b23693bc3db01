"""StepMonitor: what an optimizer's step did, every few steps, to whoever wants to know."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist.optimizer import AdaBelief
from belief_dist.options import is_first_rank, shown
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.step_consensus import Verdict
from belief_dist.telemetry.costs import StepTimes, Traffic, memory_of_process
from belief_dist.telemetry.quantiles import QUANTILES, SIGNAL, SURPRISE
from belief_dist.telemetry.records import JsonLines
from belief_dist.telemetry.statistics import ROW, Held, Measured, Sums, held, measure, nothing

# Of skipped steps, for reports.
_KINDS = {
    Verdict.SPIKE: "spike",
    Verdict.REPLICAS_DIFFER: "repair",
    Verdict.PEER_REPAIRS: "repair",
}

_Write = Callable[[int, dict[str, Any]], object]


class StepMonitor:
    """Tells every few steps what the optimizer did; reads, and changes no bit of training.

    ::

        monitor = StepMonitor(optimizer, "run/metrics.jsonl")
        ...
        optimizer.step()
        monitor.log(step, loss=loss)  # before scheduler.step() and zero_grad()

    Names are listed in docs/telemetry.md. Rank 0 measures the elements that it holds, and writes;
    nothing is sent. With a sharded optimizer that is its shard: means, root mean squares and ratios
    are then those of a sample, and norms those of a part, whose share is "model_share".

    Args:
        optimizer: A `ShardedAdaBelief` or `AdaBelief`.
        sinks: One or several, used by rank 0 alone: a path, where `JsonLines` writes; anything
            with `add_scalar(name, number, step)`, such as TensorBoard's SummaryWriter; anything
            with `log(values, step=step)`, such as a run of Weights & Biases, or with
            `log_metrics(values, step=step)`, such as the module mlflow; anything with
            `write_events([(name, number, step)])`, such as the monitor of a DeepSpeed engine; or
            a function of (step, values), such as `Prometheus()`. One that raises is a warning,
            once, and training goes on.
        every: Steps between records: those of which it is a divisor are logged.
        per_parameter: Also tell the same of each parameter.
        across_ranks: Measure the shards of all ranks: one all-reduce of 3.2 KB for each param
            group (and parameter) in steps that are logged. All ranks must then call `log`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `every` is less than 1, or `across_ranks` is asked of an unsharded optimizer.
    """

    def __init__(
        self,
        optimizer: AdaBelief | ShardedAdaBelief,
        sinks: Any,
        every: int = 10,
        per_parameter: bool = False,
        *,
        across_ranks: bool = False,
    ) -> None:
        """See the class."""
        if not isinstance(optimizer, (AdaBelief, ShardedAdaBelief)):
            raise TypeError(
                f"StepMonitor reads a ShardedAdaBelief or AdaBelief, got "
                f"{type(optimizer).__name__}; of a wrapper, pass the optimizer inside."
            )
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"every must be a number of steps, got {shown(every)}.")
        if every < 1:
            raise ValueError(f"every must be 1 or more, got {every}.")
        if across_ranks and not isinstance(optimizer, ShardedAdaBelief):
            raise ValueError(
                "across_ranks=True adds up the shards of a ShardedAdaBelief, and AdaBelief has "
                "none; leave it out."
            )
        is_one = isinstance(sinks, (str, os.PathLike)) or not isinstance(sinks, Iterable)
        self._sinks = [_writer(sink) for sink in ([sinks] if is_one else sinks)]
        self._optimizer = optimizer
        self._every = every
        self._per_parameter = per_parameter
        self._across_ranks = across_ranks
        self._times, self._traffic = StepTimes(optimizer), Traffic(optimizer)
        # Of the last step whose skip was told.
        self._seen = 0
        if isinstance(optimizer, ShardedAdaBelief):
            self._seen = optimizer._engine.consensus.calls
        self._has_warned_of_eps = False
        self._failed: set[int] = set()

    def log(self, step: int, **values: float | str | Tensor) -> dict[str, Any] | None:
        """Write a record of the step that was just taken, if it is one to be logged.

        Called after `optimizer.step()`, in every step: by all ranks, or, without `across_ranks`, by
        rank 0 alone if the script likes that better. A step that is not logged costs nothing; one
        that is waits for the device.

        Args:
            step: Number of the step.
            values: What else shall be told, such as the loss: numbers, texts, or tensors of one
                element, which are read if the step is logged.

        Returns:
            The record, on rank 0, if the step was logged; else None.
        """
        if step % self._every:
            return None
        if not (self._across_ranks or is_first_rank()):
            return None
        record: dict[str, Any] = {
            key: value if isinstance(value, (str, int, float)) else float(value.detach())
            for key, value in values.items()
        }
        record |= self._measure(step)
        if not is_first_rank():
            return None
        record |= self._traffic.since_last()
        record |= memory_of_process(self._optimizer.param_groups[0]["params"][0].device)
        record |= self._times.since_last(step)
        for number, write in enumerate(self._sinks):
            self._write(number, write, step, record)
        return record

    def _write(self, number: int, write: _Write, step: int, record: dict[str, Any]) -> None:
        try:
            write(step, dict(record))
        except Exception as error:  # a full disk or a server that is away must not end the job
            if number not in self._failed:
                self._failed.add(number)
                warnings.warn(
                    f"sink number {number} of StepMonitor has failed in step {step}, and may lack "
                    f"records from here on: {type(error).__name__}: {error}",
                    stacklevel=3,
                )

    # - What is measured

    def _measure(self, step: int) -> dict[str, Any]:
        optimizer = self._optimizer
        found: dict[str, Any] = {}
        was_taken = True
        if isinstance(optimizer, ShardedAdaBelief):
            last = optimizer.last_step
            was_taken = last.was_taken
            found["skipped_steps"] = optimizer.skipped_steps
            if last.why_not:
                found["why_skipped"] = last.why_not
            skips = [skip for skip in optimizer._engine.skips if skip.number > self._seen]
            if skips:  # by the numbers that the script gives its steps
                found["skips"] = [
                    {
                        "step": step - (last.number - skip.number),
                        "kind": _KINDS.get(skip.verdict, "skip"),
                        "why": skip.why,
                    }
                    for skip in skips
                ]
            self._seen = last.number
            if was_taken:  # else it may lack what is not finite
                found["l2_norm/grad/global"] = float(optimizer.grad_norm)
        for number, group in enumerate(optimizer.param_groups):
            found[f"lr/group{number}"] = float(group["lr"])
        if was_taken:
            found |= self._statistics()
        return found | {f"bytes/{kind}": held for kind, held in _bytes_held(optimizer).items()}

    def _statistics(self) -> dict[str, Any]:
        optimizer = self._optimizer
        parts = list(held(optimizer))
        each = measure(parts, optimizer.param_groups)
        groups = [nothing()] * len(optimizer.param_groups)
        for part, measured in zip(parts, each, strict=True):
            groups[part.group] += measured
        if self._across_ranks:
            each, groups = self._over_all_ranks(parts, each, groups)
        found: dict[str, Any] = {}
        names = [(number, f"group{number}", measured) for number, measured in enumerate(groups)]
        if self._per_parameter:
            names += [(part.group, part.name, own) for part, own in zip(parts, each, strict=True)]
        for number, name, measured in names:
            lr = float(optimizer.param_groups[number]["lr"])
            found |= {f"{kind}/{name}": value for kind, value in _told(measured, lr).items()}
        total = sum((group.sums for group in groups), Sums())
        if isinstance(optimizer, ShardedAdaBelief):
            whole = sum(spec.numel for spec in optimizer.layout.params)
            found["model_share"] = total.numel / whole if whole else 1.0
        elif total.numel_grad:
            found["l2_norm/grad/global"] = math.sqrt(total.grad)
        self._warn_of_eps([group.sums for group in groups])
        return found

    def _over_all_ranks(
        self, parts: Sequence[Held], each: Sequence[Measured], groups: Sequence[Measured]
    ) -> tuple[list[Measured], list[Measured]]:
        """Return the same of parameters and groups, over the shards of all ranks."""
        optimizer = self._optimizer
        assert isinstance(optimizer, ShardedAdaBelief)
        own = [measured.row() / part.copies for part, measured in zip(parts, each, strict=True)]
        rows = torch.zeros(len(groups), ROW, dtype=torch.float64)
        for part, row in zip(parts, own, strict=True):
            rows[part.group] += row
        if self._per_parameter:
            rows = torch.cat([rows, torch.stack(own)])
        if optimizer.comm.world_size > 1:
            rows = rows.to(optimizer.param_groups[0]["params"][0].device)
            dist.all_reduce(rows, group=optimizer.comm.group)
        told = [Measured.of_row(row) for row in rows.cpu()]
        return told[len(groups) :], told[: len(groups)]

    def _warn_of_eps(self, groups: Sequence[Sums]) -> None:
        """Warn once if most of a group's denominators are eps alone."""
        for number, sums in enumerate(groups):
            if self._has_warned_of_eps or not is_first_rank() or sums.eps <= sums.numel / 2:
                continue
            self._has_warned_of_eps = True
            group = self._optimizer.param_groups[number]
            eps = float(group["eps"])
            floor = math.sqrt(eps / (1.0 - float(group["betas"][1])))
            warnings.warn(
                f"eps={eps:g} dominates exp_avg_sq in {sums.eps / sums.numel:.0%} of param group "
                f"{number}: AdaBelief adds it in every step, so that the denominator does not fall "
                f"below {floor:.1e}, and these weights train as with SGD. Take a smaller eps (the "
                f"default is 1e-16), unless it was meant.",
                stacklevel=4,
            )


def _told(measured: Measured, lr: float) -> dict[str, float]:
    """Return a group's or parameter's statistics by the first parts of their names."""
    sums = measured.sums
    if not sums.numel:  # all of it is on other ranks, or has taken no step
        return {}
    found = {
        "l2_norm/param": _root(sums.weight),
        "l2_norm/moment": _root(sums.moment),
        "l2_norm/second_moment_sqrt": _root(sums.second),
        "l2_norm/update": lr * _root(sums.direction),
        "rms/update_direction": _root(sums.direction / sums.numel),
        "belief/signal": sums.signal / sums.numel,
        "belief/eps_share": sums.eps / sums.numel,
    }
    if sums.weight:
        found["update_to_weight"] = lr * _root(sums.direction / sums.weight)
    if sums.numel_grad:
        found["l2_norm/grad"] = _root(sums.grad)
        found["belief/surprise"] = sums.surprise / sums.numel_grad
    for kind, bins in (("belief/signal", SIGNAL), ("belief/surprise", SURPRISE)):
        for name, share in QUANTILES.items():
            value = measured.quantile(bins, share)
            if value is not None:
                found[f"{kind}_{name}"] = value
    return found


def _root(value: float) -> float:
    return math.sqrt(value) if value >= 0 else math.nan


def _bytes_held(optimizer: AdaBelief | ShardedAdaBelief) -> Mapping[str, int]:
    if isinstance(optimizer, ShardedAdaBelief):
        return optimizer.bytes_per_rank()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    found = {
        "parameters": sum(param.nbytes for param in params),
        "gradients": sum(param.grad.nbytes for param in params if param.grad is not None),
    }
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "step":
                found[name] = found.get(name, 0) + value.nbytes
    return found


def _writer(sink: Any) -> _Write:
    """Return how a record is given to a sink of any kind.

    Raises:
        TypeError: It is of no kind that is known.
    """
    if isinstance(sink, (str, os.PathLike)):
        return JsonLines(sink)
    if hasattr(sink, "add_scalar"):
        return lambda step, values: _add_scalars(sink, step, values)
    if hasattr(sink, "log_metrics"):  # numbers only; MLflow has them beside texts
        return lambda step, values: sink.log_metrics(_numbers(values), step=step)
    if hasattr(sink, "write_events"):
        return lambda step, values: sink.write_events(
            [(name, number, step) for name, number in _numbers(values).items()]
        )
    if hasattr(sink, "log"):
        return lambda step, values: sink.log(values, step=step)
    if callable(sink):
        return lambda step, values: sink(step, values)
    raise TypeError(
        f"a sink of StepMonitor is a path, a function of (step, values), or has add_scalar, "
        f"log_metrics, write_events or log, got {shown(sink)}."
    )


def _add_scalars(writer: Any, step: int, values: Mapping[str, Any]) -> None:
    for name, number in _numbers(values).items():
        writer.add_scalar(name, number, step)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}
