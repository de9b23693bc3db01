"""Where DeepSpeed meets the optimizers: what it must know of them, and when it is built around one.

Nothing here brings DeepSpeed in. It is told when somebody else has imported it, be that before an
optimizer was constructed or after.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from belief_dist.deepspeed import checkpoint_loading, fp16, offload
from belief_dist.deepspeed.import_hook import when_imported
from belief_dist.deepspeed.patching import Wrapper, wrap_method
from belief_dist.state_init_step import is_called_by

logger = logging.getLogger("belief_dist")

_OLDEST = (0, 18)

# DeepSpeed methods we wrap, in memory: (module, class, method, wrapper). A wrapper's first argument
# is the class AdaBelief; it passes calls for other optimizers on.
_HOOKS: tuple[tuple[str, str, str, Wrapper], ...] = (
    (
        "runtime.engine",
        "DeepSpeedEngine",
        "zero_force_ds_cpu_optimizer",
        offload.insists_on_its_own,
    ),
    (
        "runtime.base_optimizer",
        "ZeROOptimizer",
        "_configure_master_weights",
        offload.configure_master_weights,
    ),
    (
        "runtime.zero.stage_1_and_2",
        "DeepSpeedZeroOptimizer",
        "__init__",
        offload.construct_stage12,
    ),
    (
        "runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3",
        "__init__",
        offload.construct_stage3,
    ),
    (
        "runtime.swap_tensor.optimizer_utils",
        "OptimizerSwapper",
        "_adjust_for_misaligned_lengths",
        offload.align_gradients,
    ),
    (
        "runtime.engine",
        "DeepSpeedEngine",
        "_configure_fp16_optimizer",
        fp16.refuse_scale_at_stage0,
    ),
    (
        "runtime.base_optimizer",
        "ZeROOptimizer",
        "load_hp_checkpoint_state_from_checkpoint_dir",
        checkpoint_loading.load_universal_stage12,
    ),
    (
        "runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3",
        "load_hp_checkpoint_state_from_checkpoint_dir_stage3",
        checkpoint_loading.load_universal_stage3,
    ),
    (
        "runtime.engine",
        "DeepSpeedEngine",
        "load_checkpoint",
        checkpoint_loading.load_checkpoint,
    ),
)
# An engine looks at its optimizer once, whether it has constructed it or was given it, after it has
# cast and broadcast the model, and then chooses a wrapper of its own. Here ShardedAdaBelief enters.
_SANITY_CHECK = ("runtime.engine", "DeepSpeedEngine", "_do_optimizer_sanity_check")
# Called with an engine that is being built and its optimizer, by the optimizer's class.
_entrances: dict[type[Optimizer], Callable[[Any, Any], None]] = {}
# What an engine's step, and the wrapper that it puts around an optimizer of 16-bit parameters, call
# `optimizer.step` from.
_ENGINE_STEPS = ("_take_model_step", "initialize_optimizer_states")


def serve_zero(cls: type[Optimizer], base: type[Optimizer]) -> None:
    """Have DeepSpeed's ZeRO take `cls` as tested, and offload, save and load it as its own.

    Without it a user would have to write `"zero_allow_untested_optimizer": true`, and more.
    Constructors call this, which is early enough: DeepSpeed looks at what it constructed or was
    given afterwards.

    Args:
        cls: The optimizer's class itself; DeepSpeed's list of tested ones has no base classes.
        base: AdaBelief, whose subclasses are served as it is.

    Raises:
        RuntimeError: An engine of a DeepSpeed that is too old builds this optimizer.
    """
    if _is_too_old() and is_called_by({"_configure_basic_optimizer"}):
        oldest = ".".join(map(str, _OLDEST))
        raise RuntimeError(
            f"AdaBelief needs DeepSpeed {oldest} or newer as its engine, this is {_version()}; "
            f'run pip install -U "deepspeed>={oldest}".'
        )
    when_imported("deepspeed", _list_as_tested, cls)
    when_imported("deepspeed", _extend, base)


def _version() -> str:
    return str(getattr(sys.modules.get("deepspeed"), "__version__", "of unknown version"))


def _is_too_old() -> bool:
    found = re.match(r"(\d+)\.(\d+)", _version())
    return found is not None and tuple(map(int, found.groups())) < _OLDEST


def _list_as_tested(cls: type[Optimizer]) -> None:
    zero_utils = sys.modules.get("deepspeed.runtime.zero.utils")
    supported = getattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None and cls not in supported:
        supported.append(cls)


def _extend(base: type[Optimizer]) -> None:
    # A DeepSpeed that is too old stays as it is: what has loaded it may have another use for it.
    if not _is_too_old():
        for module, owner, name, wrapper in _HOOKS:
            _wrap(module, owner, name, partial(wrapper, base))


def _wrap(module: str, owner: str, name: str, wrapper: Wrapper) -> None:
    try:
        found = getattr(importlib.import_module(f"deepspeed.{module}"), owner, None)
    except ImportError:
        found = None
    if found is None or name not in vars(found):
        logger.warning(
            "DeepSpeed %s has no %s.%s.%s: belief_dist cannot complete it; see "
            "docs/deepspeed-offload.md for what that means",
            _version(),
            module,
            owner,
            name,
        )
        return
    wrap_method(found, name, wrapper)


def on_engine(cls: type[Optimizer], enter: Callable[[Any, Any], None]) -> None:
    """Call `enter(engine, optimizer)` for every engine that is built with an optimizer of `cls`."""
    _entrances[cls] = enter


def watch_engines() -> None:
    """See to it that engines built from now on call what `on_engine` was given.

    Our classes alone enter, and go unwrapped. Constructors call this.
    """
    when_imported("deepspeed", _wrap, *_SANITY_CHECK, _check_or_enter)


def _check_or_enter(original: Wrapper, engine: Any, optimizer: Any) -> Any:
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
        raise RuntimeError(
            f"this engine of DeepSpeed {_version()} was built around ShardedAdaBelief unnoticed, "
            f'as this version looks at optimizers elsewhere: use DeepSpeed 0.19.8, or "type": '
            f'"AdaBelief" with a ZeRO stage.'
        )
