"""What users see of a step's gradients: their norms, and themselves before they are clipped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from belief_dist.sharding.norms import MODEL


class OwnGradient(NamedTuple):
    """What this rank has of a parameter's gradient, after its reduction.

    Attributes:
        param: The parameter.
        start: The first of this rank's elements in the flattened parameter (its local part, of a
            DTensor).
        total: (n,), float32 (float64 of such parameters; of a single rank, the parameters' dtype):
            the sums over all ranks of n elements from `start` on; read only. Empty where other
            ranks have all.
        factor: One element, float64: `total` times this is the mean gradient, unclipped.
    """

    param: Tensor
    start: int
    total: Tensor
    factor: Tensor


GradientHook = Callable[[Iterator[OwnGradient]], None]


class GradientHooks:
    """The functions that look at the gradients of each step."""

    def __init__(self) -> None:
        """Begin without any."""
        self._hooks: OrderedDict[int, GradientHook] = OrderedDict()
        self._failure: Exception | None = None

    def add(self, hook: GradientHook) -> RemovableHandle:
        """Call `hook` in every step, until it is removed by what is returned."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def call(self, gradients: Callable[[], Iterator[OwnGradient]]) -> None:
        """Show the gradients to each hook.

        An exception waits until the step has ended: the other ranks are in it too.
        """
        for hook in list(self._hooks.values()):
            try:
                hook(gradients())
            except Exception as error:
                self._failure = self._failure or error

    def raise_failure(self) -> None:
        """Raise what a hook has raised."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


class GradientAccess:
    """The part of `ShardedAdaBelief` that tells about gradients."""

    _engine: Any

    @property
    def grad_norm(self) -> Tensor:
        """The L2 norm of the last step's mean gradient before clipping; one element, float64.

        What is not finite does not count in it: of a step skipped for that it tells nothing.
        Neither do groups with ``"clip": False`` or a ``"max_grad_norm"`` of their own.
        """
        norm: Tensor = self._engine.grad_norm
        return norm

    @property
    def group_grad_norms(self) -> dict[int, Tensor]:
        """The same of each param group with a ``"max_grad_norm"``, by its number.

        Empty before the first step.
        """
        norms = self._engine.grad_scales.norms
        return {norm - 1: value for norm, value in norms.items() if norm != MODEL}

    def register_pre_clip_hook(self, hook: GradientHook) -> RemovableHandle:
        """Have a function look at the reduced gradients of each step, before they are clipped.

        It is called on every rank inside `step`, with what this rank owns of the gradients, for
        statistics: changes would have other norms than those that are clipped. On a GPU it may run
        in steps that are skipped then, whose verdict is not known yet, and the host waits if it
        reads a value. What it raises is raised when the step has ended, on this rank alone.

        Args:
            hook: Takes an iterator over an `OwnGradient` for each parameter that has a gradient on
                any rank.

        Returns:
            What removes it, by `remove()`.
        """
        hooks: GradientHooks = self._engine.gradient_hooks
        return hooks.add(hook)
