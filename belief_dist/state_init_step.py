"""Tells an optimizer's real first step from one that a framework takes to make it create states."""

from __future__ import annotations

import sys
from collections.abc import Collection
from types import FrameType

# Functions that set every gradient to zero and call `step()` once, for its side effect. Adapters
# add those of their frameworks; this one is torch.distributed.checkpoint's.
STATE_INIT_FUNCTIONS = {"_init_optim_state"}
# What get_optimizer_state_dict and set_optimizer_state_dict call.
TORCH_STATE_DICT = ("_get_optim_state_dict", "_load_optim_state_dict")


def is_state_init_step() -> bool:
    """Return whether the running `step()` was called only to create states.

    For AdaBelief such a step is not harmless: it would count, decay the weights, and leave eps in
    the second moment. It cannot be told by its gradients: real ones may all be zero too, for
    instance on the rank whose ZeRO partition lies below a layer that starts at zero, and skipping
    that step would silently diverge from the unsharded result. So the call stack is searched; that
    is cheap enough for the first step, the only one that has to know.
    """
    return is_called_by(STATE_INIT_FUNCTIONS)


def is_called_by(names: Collection[str]) -> bool:
    """Return whether a function with one of these names is among the callers."""
    return _caller(names) is not None


def wants_full_state() -> bool:
    """Return whether torch's get_optimizer_state_dict asks, with full_state_dict=True."""
    frame = _caller(TORCH_STATE_DICT[:1])
    info = None if frame is None else frame.f_locals.get("info")
    return bool(getattr(info, "full_state_dict", False))


def _caller(names: Collection[str]) -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name not in names:
        frame = frame.f_back
    return frame
