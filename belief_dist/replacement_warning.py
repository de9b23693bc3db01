"""Warn if another optimizer trains the parameters that were given to AdaBelief.

Accelerate and the Hugging Face Trainer silently replace an optimizer that the script has built by
DeepSpeedCPUAdam or AdamW. The replaced object never takes a step, so it is tracked from its
construction to its first step.
"""

from __future__ import annotations

import functools
import logging
import weakref
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from belief_dist.options import is_first_rank

logger = logging.getLogger("belief_dist")

# Steps of other optimizers to examine. One is enough, unless a framework takes a step just to
# create the states (see state_init_step).
_MAX_EXAMINED = 10


class _Watched:
    """An optimizer that has not taken a step yet, referred to weakly.

    Its parameters are looked up in it while it lives. Only when it has been deleted they are
    referred to weakly themselves: torch cannot swap a tensor that has weak references, so that
    until then models may still be moved, materialized and loaded by swapping.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.name = type(optimizer).__name__
        self.optimizer = weakref.ref(optimizer)
        self.remaining = _MAX_EXAMINED
        self._left: list[weakref.ref[Tensor]] = []
        weakref.finalize(optimizer, self._outlive, optimizer.param_groups).atexit = False

    def _outlive(self, param_groups: list[dict[str, Any]]) -> None:
        if any(watched is self for watched in _unstepped):
            self._left = [weakref.ref(p) for group in param_groups for p in group["params"]]

    @property
    def params(self) -> list[Tensor]:
        """The parameters that still exist."""
        optimizer = self.optimizer()
        if optimizer is not None:
            return [param for group in optimizer.param_groups for param in group["params"]]
        return [param for ref in self._left if (param := ref()) is not None]

    def is_trained_by(self, other: Optimizer) -> bool:
        """Return whether `other` trains a parameter of this optimizer for certain."""
        params = self.params
        stepped = [param for group in other.param_groups for param in group["params"]]
        # If this optimizer has been deleted, the script may have replaced it on purpose. Under
        # DeepSpeed (below), a deleted one has been replaced silently, too.
        if self.optimizer() is not None and {*map(id, params)} & {*map(id, stepped)}:
            return True
        if any(_is_zero_3_owner(param, other) for param in params):
            return True
        fragments = {_address(f) for param in params if (f := _zero_fragment(param)) is not None}
        return any(_address(param) in fragments for param in stepped)


_unstepped: list[_Watched] = []


def warn_if_replaced(optimizer: Optimizer) -> None:
    """Warn, once and on rank 0, if another optimizer steps the parameters in place of `optimizer`.

    Called at the end of the constructor. Has no cost after the optimizer's own first step.
    """
    _install_hook()
    _unstepped.append(_Watched(optimizer))


@functools.cache
def _install_hook() -> None:
    register_optimizer_step_post_hook(_after_any_step)


def _after_any_step(stepped: Optimizer, args: Any, kwargs: Any) -> None:
    for watched in list(_unstepped):
        if watched.optimizer() is stepped:
            _forget(watched)
        elif type(stepped).__name__ != watched.name and watched.is_trained_by(stepped):
            _forget(watched)
            if is_first_rank():
                logger.warning(
                    "%s trains the parameters that were given to %s, which has not taken a step: "
                    'name AdaBelief in the DeepSpeed JSON ("optimizer": {"type": "AdaBelief", ...})'
                    " instead of passing an object, or ask belief_dist.verify() for the cause.",
                    type(stepped).__name__,
                    watched.name,
                )
        else:
            watched.remaining -= 1
            if not watched.remaining or not watched.params:
                _forget(watched)


def _forget(watched: _Watched) -> None:
    with suppress(ValueError):  # another thread's step was faster
        _unstepped.remove(watched)


def _address(tensor: Tensor) -> object:
    """Return the address of a tensor's storage; a unique object if it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or object()
    except RuntimeError:  # a DTensor
        return object()


def _zero_fragment(param: Tensor) -> Tensor | None:
    """Return the fragment of the fp32 master that ZeRO-1 or 2 updates in place of `param`."""
    mapping = getattr(param, "_hp_mapping", None)
    return getattr(mapping, "hp_fragment", None)


def _is_zero_3_owner(param: Tensor, other: Optimizer) -> bool:
    """Return whether `other` is the inner optimizer of the ZeRO-3 optimizer that owns `param`."""
    return getattr(getattr(param, "_z3_optimizer", None), "optimizer", None) is other
