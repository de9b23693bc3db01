"""What the host does for an optimizer, by name: for torch's profiler, and for whoever times it.

A phase is a range "belief_dist::NAME" in a trace of `torch.profiler`, on every path. Who also wants
seconds calls `Phases.start`; until then, and without a profiler, a phase is one question.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import record_function

Phase = Literal[
    "step",  # all of `step`, but a closure
    "reduce",  # brings gradients together, and starts to sum them over the ranks
    "reduce_wait",  # waits for sums, and adds up what has come
    "consensus",  # the small message by which ranks agree about the step
    "update",
    "gather",  # gives the others this rank's parameters
    "gather_wait",  # waits for theirs
]

_NOTHING = nullcontext()
# Where a phase is when no step is under way: hooks reduce in backward, and forward reads.
_OUTSIDE = {"reduce": "backward", "reduce_wait": "backward"}


class Phases:
    """The phases of one optimizer.

    Attributes:
        steps: How many steps have ended since `start`.
    """

    def __init__(self) -> None:
        """Measure nothing yet."""
        self.steps = 0
        self._seconds: dict[str, float] | None = None
        self._inner: _Timed | None = None  # the phase that is under way

    def start(self) -> None:
        """Measure from now on; again it does nothing."""
        if self._seconds is None:
            self._seconds = {}

    def seconds(self) -> dict[str, float]:
        """Return the seconds of the host since `start`, by where and what.

        "optimizer_step" is all of `step`. "step/update", "backward/reduce_wait" and so on are each
        without the phases inside.
        """
        return dict(self._seconds or {})

    def __call__(self, name: Phase) -> AbstractContextManager[object]:
        """Return a context that is one phase."""
        traces = _profiler_enabled()
        if self._seconds is None:
            return record_function(f"belief_dist::{name}") if traces else _NOTHING
        return _Timed(self, self._seconds, name, traces=traces)


class _Timed:
    """A phase that is timed."""

    def __init__(
        self, phases: Phases, seconds: dict[str, float], name: Phase, *, traces: bool
    ) -> None:
        self._phases, self._seconds, self._name = phases, seconds, name
        self._range = record_function(f"belief_dist::{name}") if traces else None
        self._outer: _Timed | None = None
        self._in_step = name == "step"

    def __enter__(self) -> None:
        if self._range is not None:
            self._range.__enter__()
        self._outer = self._phases._inner
        self._phases._inner = self
        if self._outer is not None:
            self._in_step |= self._outer._in_step
        self._inside = 0.0  # seconds of phases in this one
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        took = time.perf_counter() - self._began
        self._phases._inner = self._outer
        if self._outer is not None:
            self._outer._inside += took
        if self._name == "step":
            key = "optimizer_step"
            self._phases.steps += 1
        else:
            took -= self._inside
            place = "step" if self._in_step else _OUTSIDE.get(self._name, "forward")
            key = f"{place}/{self._name}"
        self._seconds[key] = self._seconds.get(key, 0.0) + took
        if self._range is not None:
            self._range.__exit__(None, None, None)


class TimedWait:
    """An operation under way, waiting for which is a phase."""

    def __init__(self, operation: object, phases: Phases, name: Phase) -> None:
        """Wait for `operation`, which has a method `wait`."""
        self._wait = operation.wait  # type: ignore[attr-defined]
        self._phases, self._name = phases, name

    def wait(self) -> None:
        """Wait for it."""
        with self._phases(self._name):
            self._wait()
