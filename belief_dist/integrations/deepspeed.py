"""Where DeepSpeed meets the optimizers: what it must know of them, and when it is built around one.

Nothing here imports DeepSpeed; where it is not loaded, nothing happens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from belief_dist.integrations.extension import Around, extend_method
from belief_dist.integrations.rehearsal import is_called_by

_OLDEST = (0, 18)
_SANITY_CHECK = "_do_optimizer_sanity_check"  # of an engine, on its optimizer
# Called with an engine that is being built and its optimizer, by the optimizer's class.
_entrances: dict[type[Optimizer], Callable[[Any, Any], None]] = {}
# What an engine's step, and the wrapper that it puts around an optimizer of 16-bit parameters, call
# `optimizer.step` from.
_ENGINE_STEPS = ("_take_model_step", "initialize_optimizer_states")


def register_zero_optimizer(cls: type[Optimizer]) -> None:
    """Add `cls` to the optimizers that DeepSpeed's ZeRO stages accept as tested.

    Without it a user would have to write `"zero_allow_untested_optimizer": true`. The optimizers
    call this in their constructors, which is early enough: DeepSpeed checks what it constructed or
    was given afterwards, by exact type.

    Args:
        cls: The optimizer's class itself; DeepSpeed does not look at base classes.

    Raises:
        RuntimeError: An engine of a DeepSpeed that is too old builds this optimizer.
    """
    if "deepspeed" not in sys.modules:
        return
    _check_version(getattr(sys.modules["deepspeed"], "__version__", ""))
    zero_utils = sys.modules.get("deepspeed.runtime.zero.utils")
    supported = getattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None and cls not in supported:
        supported.append(cls)


def _check_version(version: str) -> None:
    # Only where an engine is the caller: a DeepSpeed that something else has loaded does no harm.
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) >= _OLDEST:
        return
    if is_called_by({"_configure_basic_optimizer"}):
        oldest = ".".join(map(str, _OLDEST))
        raise RuntimeError(
            f"AdaBelief needs DeepSpeed {oldest} or newer as its engine, this is {version}; "
            f'run pip install -U "deepspeed>={oldest}".'
        )


def on_engine(cls: type[Optimizer], enter: Callable[[Any, Any], None]) -> None:
    """Call `enter(engine, optimizer)` for every engine that is built with an optimizer of `cls`."""
    _entrances[cls] = enter


def watch_engines() -> None:
    """See to it that engines built from now on call what `on_engine` was given.

    An engine looks at its optimizer once, whether it has constructed it or was given it, after it
    has cast and broadcast the model, and then chooses a wrapper of its own. That is where ours
    enters, for our classes alone, and goes unwrapped. Constructors call this: DeepSpeed may be
    loaded at any time before.
    """
    engine_class = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    # Where a later version has no such method, `refuse_unknown_engine` speaks.
    if engine_class is not None and hasattr(engine_class, _SANITY_CHECK):
        extend_method(engine_class, _SANITY_CHECK, _check_or_enter)


def _check_or_enter(original: Around, engine: Any, optimizer: Any) -> Any:
    for cls, enter in _entrances.items():
        if isinstance(optimizer, cls):
            enter(engine, optimizer)
            return None
    return original(engine, optimizer)


def refuse_unknown_engine() -> None:
    """Raise if a DeepSpeed engine calls that has not entered: it reduces and clips once more.

    Raises:
        RuntimeError: It does.
    """
    if "deepspeed" in sys.modules and is_called_by(_ENGINE_STEPS):
        version = getattr(sys.modules["deepspeed"], "__version__", "of unknown version")
        raise RuntimeError(
            f"this engine of DeepSpeed {version} was built around ShardedAdaBelief unnoticed: "
            f"import deepspeed before you build the optimizer, or let the engine build it by "
            f'"type": "ShardedAdaBelief". If you do, this version of DeepSpeed is not supported.'
        )


def extend_deepspeed(cls: type[Optimizer]) -> None:
    """Have DeepSpeed offload, save and load optimizers of this class as it does its own.

    Like `register_zero_optimizer`, in memory, from constructors, and only where it is loaded.
    """
    if "deepspeed.runtime.engine" in sys.modules:
        from belief_dist.integrations.deepspeed_checkpoint import extend_checkpoints
        from belief_dist.integrations.deepspeed_offload import extend_offload

        extend_offload(cls)
        extend_checkpoints(cls)
