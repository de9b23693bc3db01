"""What the optimizer asks the code that drives its steps: a training loop, or an engine."""

from __future__ import annotations

from collections.abc import Collection


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
