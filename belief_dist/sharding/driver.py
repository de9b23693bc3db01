"""What the optimizer asks the code that drives its steps: a training loop, or an engine."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any


class Driver:
    """A plain training loop: every backward pass outside `no_sync` is the last of its step.

    Adapters of engines that know more derive from it and hand it over by
    `ShardedAdaBelief.drive_by`.

    Attributes:
        max_grad_norm: Clip the mean gradient to this global L2 norm, or None.
        answers: Names of attributes that an engine looks for on its optimizer, and that this driver
            has in the optimizer's place.
    """

    answers: Collection[str] = ()

    def __init__(self, max_grad_norm: float | None) -> None:
        self.max_grad_norm = max_grad_norm

    def is_last_backward(self) -> bool:
        """Return whether the backward pass that begins is the last one before a step."""
        return True


class Driven:
    """The part of `ShardedAdaBelief` that adapters of engines hand their driver to."""

    _engine: Any

    @property
    def driver(self) -> Driver:
        """What is asked which backward pass is a step's last, and which norm to clip to."""
        driver: Driver = self._engine.driver
        return driver

    def drive_by(self, driver: Driver) -> None:
        """Ask `driver` from now on; called by all ranks, between two steps."""
        self._engine.driver = self._engine.reducer.driver = driver

    if not TYPE_CHECKING:  # a type checker would take it to answer every name

        def __getattr__(self, name: str) -> Any:
            """Answer for attributes that an engine looks for; they are its driver's."""
            engine = vars(self).get("_engine")
            if engine is not None and name in engine.driver.answers:
                return getattr(engine.driver, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
