"""The options of the sharded engine: a field for each, from which everything else follows.

A field states the default and the check of its option. Range checks, the comparison between ranks
and the sentences of both are derived from the fields, so that a new option is a keyword of
`ShardedAdaBelief`, a field here, and the place that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any, Literal

import torch

from belief_dist.deprecations import warn_once
from belief_dist.options import as_float, is_one_of, positive_or_none, shown

Reduction = Literal["ordered", "native"]
# Of what is counted: more than any step has, and no more than float64 and C take.
_MOST = 2**31 - 1
# Takes an option's name and value; returns the value as it is stored, or raises.
Check = Callable[[str, Any], Any]


def _one_of(*allowed: Any, hint: str = "") -> Check:
    def check(name: str, value: Any) -> Any:
        # True equals 1, and is no stage.
        if isinstance(value, bool) or not is_one_of(value, allowed):
            *most, last = map(_shown, allowed)
            raise ValueError(
                f"{name} must be {', '.join(most)} or {last}, got {_shown(value)}{hint}."
            )
        return next(each for each in allowed if each == value)

    return check


def _dtype(*allowed: torch.dtype | None) -> Check:
    choose = _one_of(*allowed)

    def check(name: str, value: Any) -> Any:
        if isinstance(value, str):  # as in JSON or YAML
            found = getattr(torch, value.removeprefix("torch."), None)
            value = found if isinstance(found, torch.dtype) else value
        return choose(name, value)

    return check


def _reduction(name: str, value: Any) -> Any:
    if isinstance(value, str) and value == "auto":
        warn_once("reduction='auto' means 'ordered', the default; leave it out.", stacklevel=4)
        return "ordered"
    return _one_of("ordered", "native")(name, value)


def _true_or_false(name: str, value: Any) -> Any:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}.")
    return value


def _shared_memory(name: str, value: Any) -> Any:
    if isinstance(value, str) and value == "cuda":
        return value
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True, False or 'cuda', got {shown(value)}.")
    return value


def _integer(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {shown(value)}.")
    return value


def _positive_integer(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {shown(value)}.")
    return value


def _count_or_none(name: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
        raise ValueError(
            f"{name} must be an integer from 1 to {_MOST} or None, got {shown(value)}."
        )
    return value


def _factor_or_none(name: str, value: Any) -> Any:
    if value is None:
        return None
    factor = as_float(name, value)
    if not 1.0 < factor < math.inf:
        raise ValueError(f"{name} must be > 1 and finite, or None, got {factor}.")
    return factor


def check_timeout(timeout: Any) -> None:
    """Check the argument `timeout`, which is no option: ranks may have different ones.

    Raises:
        TypeError: It is no timedelta.
        ValueError: It is not positive.
    """
    if timeout is not None and not isinstance(timeout, timedelta):
        raise TypeError(
            f"timeout must be a datetime.timedelta or None, got {shown(timeout)}; "
            f"timedelta(seconds=60) makes one."
        )
    if timeout is not None and timeout <= timedelta(0):
        raise ValueError(f"timeout must be > 0 or None, got {timeout}.")


def _decay_or_none(name: str, value: Any) -> Any:
    if value is None:
        return None
    decay = as_float(name, value)
    if not 0.0 < decay < 1.0:
        raise ValueError(f"{name} must be > 0 and < 1, or None, got {decay}.")
    return decay


def _offload(name: str, value: Any) -> Any:
    if value is None or (isinstance(value, str) and value == "cpu"):
        return value
    is_fraction = isinstance(value, float) and 0.0 < value <= 1.0
    is_bytes = isinstance(value, int) and not isinstance(value, bool) and 2 <= value
    if not is_fraction and not is_bytes:
        raise ValueError(
            f"{name} must be None, 'cpu', a fraction of masters and states (a float > 0 and <= 1), "
            f"or how many of their bytes leave the device (an integer > 1), got {shown(value)}."
        )
    return value


_STAGE = _one_of(
    1, 2, hint="; for sharded parameters (stage 3) use AdaBelief with FSDP2 or DeepSpeed"
)


@dataclass(frozen=True)
class EngineOptions:
    """How `ShardedAdaBelief` shards, stores and communicates; its docstring tells each meaning."""

    stage: Literal[1, 2] = field(default=1, metadata={"check": _STAGE})
    shard_over: Literal["row", "mesh"] = field(
        default="row", metadata={"check": _one_of("row", "mesh")}
    )
    micro_batches: int | None = field(default=None, metadata={"check": _count_or_none})
    reduction: Reduction = field(default="ordered", metadata={"check": _reduction})
    reduce_dtype: torch.dtype | None = field(
        default=None, metadata={"check": _dtype(None, torch.float32, torch.bfloat16, torch.int8)}
    )
    master: Literal["fp32", "remainder", "remainder8"] = field(
        default="fp32", metadata={"check": _one_of("fp32", "remainder", "remainder8")}
    )
    state_dtype: torch.dtype = field(
        default=torch.float32,
        metadata={"check": _dtype(torch.float32, torch.bfloat16, torch.uint8)},
    )
    seed: int = field(default=0, metadata={"check": _integer})
    ema_decay: float | None = field(default=None, metadata={"check": _decay_or_none})
    ema_dtype: torch.dtype = field(
        default=torch.float32, metadata={"check": _dtype(torch.float32, torch.bfloat16)}
    )
    bucket_bytes: int = field(default=32 << 20, metadata={"check": _positive_integer})
    max_grad_norm: float | None = field(default=None, metadata={"check": positive_or_none})
    max_grad_value: float | None = field(default=None, metadata={"check": positive_or_none})
    overlap: bool = field(default=True, metadata={"check": _true_or_false})
    offload: Literal["cpu"] | float | None = field(default=None, metadata={"check": _offload})
    shared_memory: bool | Literal["cuda"] = field(default=True, metadata={"check": _shared_memory})
    check_replicas: bool = field(default=True, metadata={"check": _true_or_false})
    check_states: bool = field(default=False, metadata={"check": _true_or_false})
    spike_guard: float | None = field(default=None, metadata={"check": _factor_or_none})
    on_desync: Literal["raise", "repair"] = field(
        default="raise", metadata={"check": _one_of("raise", "repair")}
    )
    sync_buffers: bool = field(default=True, metadata={"check": _true_or_false})

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> EngineOptions:
        """Return the checked options among a constructor's arguments.

        Raises:
            TypeError: A value has the wrong type.
            ValueError: A value is out of range, or two options exclude each other.
        """
        checked = {}
        for option in fields(cls):
            check = option.metadata["check"]
            checked[option.name] = check(option.name, arguments[option.name])
        options = cls(**checked)
        if options.reduce_dtype == torch.int8 and options.reduction == "native":
            raise ValueError(
                "reduce_dtype=torch.int8 needs reduction='ordered': backends cannot add it."
            )
        if options.shared_memory == "cuda" and options.reduction == "native":
            raise ValueError(
                "shared_memory='cuda' needs reduction='ordered': the backend's own reduction sends "
                "messages."
            )
        if options.micro_batches is not None and options.reduction == "native":
            raise ValueError(
                "micro_batches needs reduction='ordered': in which order a backend adds, and so "
                "the result, changes with the number of ranks."
            )
        if options.micro_batches is not None and options.reduce_dtype == torch.int8:
            raise ValueError(
                "micro_batches does not go together with reduce_dtype=torch.int8, whose rounding "
                "errors stay on a rank and would make the result depend on how many there are; "
                "torch.bfloat16 halves the bytes."
            )
        if options.ema_dtype != torch.float32 and not options.keeps_averages:
            raise ValueError(
                f"ema_dtype={options.ema_dtype} needs ema_decay, without which no average is kept."
            )
        if options.check_states and options.offload not in (None, "cpu"):
            raise ValueError(
                f"check_states does not go together with offload={options.offload}: its sums lie "
                f"where the states are, and these would be on the device and on the host; "
                f"offload='cpu' has all of them on the host."
            )
        if options.on_desync == "repair" and not options.check_replicas:
            raise ValueError(
                "on_desync='repair' needs check_replicas=True, which finds what differs."
            )
        return options

    @property
    def keeps_full_gradients(self) -> bool:
        """Whether a rank keeps all of its own gradient until the step: ZeRO-1 by the book."""
        return self.stage == 1 and self.micro_batches is None

    @property
    def keeps_averages(self) -> bool:
        """Whether an average of the weights is kept."""
        return self.ema_decay is not None

    @property
    def remainder_dtype(self) -> torch.dtype | None:
        """What is kept of the master of a bfloat16 parameter beside the parameter, if not all."""
        return {"remainder": torch.int16, "remainder8": torch.int8}.get(self.master)

    def stored_dtype(self, compute: torch.dtype) -> torch.dtype:
        """Return the dtype of states of parameters that are computed in `compute`.

        Float32 is the name of "not compressed": states of float64 parameters are float64.
        """
        return compute if self.state_dtype == torch.float32 else self.state_dtype

    def average_dtype(self, compute: torch.dtype) -> torch.dtype:
        """Return the same of the average of the weights."""
        return compute if self.ema_dtype == torch.float32 else self.ema_dtype

    def check_param(self, dtype: torch.dtype, label: str) -> None:
        """Refuse a parameter whose dtype does not go together with an option.

        Args:
            dtype: Of the parameter.
            label: Names it in the error.

        Raises:
            ValueError: It does not.
        """
        if dtype == torch.float64 and self.reduce_dtype is not None:
            raise ValueError(
                f"reduce_dtype={self.reduce_dtype} would narrow the gradient of float64 parameter "
                f"{label}; leave it None, or use float32 parameters."
            )
        if dtype == torch.float64 and self.state_dtype != torch.float32:
            raise ValueError(
                f"state_dtype={self.state_dtype} would narrow the states of float64 parameter "
                f"{label}; leave it out, or use float32 parameters."
            )
        if dtype == torch.float64 and self.keeps_averages and self.ema_dtype != torch.float32:
            raise ValueError(
                f"ema_dtype={self.ema_dtype} would narrow the average of float64 parameter "
                f"{label}; leave it out, or use float32 parameters."
            )
        if dtype == torch.float16 and self.remainder_dtype is not None:
            raise ValueError(
                f"master={self.master!r} cannot serve float16 parameter {label}, which is not the "
                f"upper half of a float32 number; use bfloat16, or master='fp32'."
            )

    def by_name(self) -> dict[str, list[Any]]:
        """Return what all ranks must have alike, in the form of `rank_checks.compare_ranks`."""
        return {f"option {each.name}": [getattr(self, each.name)] for each in fields(self)}


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, torch.dtype) else shown(value)
