"""What DeepSpeed must know of the optimizers, and the table of its methods that we wrap.

DeepSpeed is never imported from here: `observe_built` asks to be called when a script has imported
it, be that before an optimizer was constructed or after.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Sequence
from functools import cache, partial

from torch.optim import Optimizer

from belief_dist.deepspeed import checkpoint_loading, fp16, offload
from belief_dist.deepspeed.import_hook import when_imported
from belief_dist.deepspeed.stage0 import engine as stage0
from belief_dist.deepspeed.stage0.driver import EngineDriver
from belief_dist.deepspeed.wrapping import Wrapper, wrap_method
from belief_dist.optimizer import AdaBelief
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.state_init_step import STATE_INIT_FUNCTIONS, is_called_by

logger = logging.getLogger("belief_dist")

_OLDEST = (0, 18)
# Module, class, method, wrapper.
_Wrapped = tuple[str, str, str, Wrapper]

# DeepSpeed methods we wrap, in memory, for AdaBelief. A wrapper gets the class AdaBelief, the
# method as it was, and its arguments; what concerns other optimizers it hands on.
_FOR_ADABELIEF: tuple[_Wrapped, ...] = (
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
# And for ShardedAdaBelief in an engine at stage 0; here wrappers need no class.
_FOR_SHARDED: tuple[_Wrapped, ...] = tuple(
    ("runtime.engine", "DeepSpeedEngine", method, wrapper)
    for method, wrapper in (
        ("_do_optimizer_sanity_check", stage0.attach_or_check),
        ("allreduce_gradients", stage0.allreduce_gradients),
        ("clip_fp32_gradients", stage0.clip_fp32_gradients),
        ("zero_grad", stage0.zero_grad),
        ("save_checkpoint", stage0.save_checkpoint),
        ("load_checkpoint", stage0.load_checkpoint),
    )
)
# What an engine's step, and the wrapper that it puts around an optimizer of 16-bit parameters, call
# `optimizer.step` from.
_STATE_INIT = "initialize_optimizer_states"
_ENGINE_STEPS = ("_take_model_step", _STATE_INIT)

# The construction of the stage-0 wrapper for 16 bits takes a step to have states created.
STATE_INIT_FUNCTIONS.add(_STATE_INIT)


def observe_built(optimizer: Optimizer) -> None:
    """Have DeepSpeed serve an optimizer of ours that has just been constructed.

    AdaBelief's class becomes one that ZeRO takes as tested, and offloads, saves and loads as its
    own; without that a user would have to write `"zero_allow_untested_optimizer": true`, and more.
    Engines built from now on attach a ShardedAdaBelief. Constructors are early enough for both:
    DeepSpeed looks at what it has constructed or was given afterwards.

    Raises:
        RuntimeError: An engine of a DeepSpeed that is too old builds this AdaBelief.
    """
    if isinstance(optimizer, ShardedAdaBelief):
        when_imported("deepspeed", _wrap_for_sharded)
        return
    if _is_too_old() and is_called_by({"_configure_basic_optimizer"}):
        oldest = ".".join(map(str, _OLDEST))
        raise RuntimeError(
            f"AdaBelief needs DeepSpeed {oldest} or newer as its engine, this is {_version()}; "
            f'run pip install -U "deepspeed>={oldest}".'
        )
    # The optimizer's class itself: DeepSpeed's list of tested ones has no base classes.
    when_imported("deepspeed", _list_as_tested, type(optimizer))
    when_imported("deepspeed", _wrap_for_adabelief)


def observe_first_step(optimizer: Optimizer) -> None:
    """Refuse a DeepSpeed engine that never attached its optimizer: it reduces and clips once more.

    Raises:
        RuntimeError: Such an engine makes the step.
    """
    if not isinstance(optimizer, ShardedAdaBelief) or isinstance(optimizer.driver, EngineDriver):
        return
    if "deepspeed" in sys.modules and is_called_by(_ENGINE_STEPS):
        raise RuntimeError(
            f"this engine of DeepSpeed {_version()} was built around ShardedAdaBelief unnoticed, "
            f'as this version looks at optimizers elsewhere: use DeepSpeed 0.19.8, or "type": '
            f'"AdaBelief" with a ZeRO stage.'
        )


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


def _wrap_for_adabelief() -> None:
    # A DeepSpeed that is too old stays as it is: what has loaded it may have another use for it.
    if not _is_too_old():
        _wrap([(*wrapped[:3], _of_adabelief(wrapped[3])) for wrapped in _FOR_ADABELIEF])


@cache  # so that a wrapper is recognized where it stands already
def _of_adabelief(wrapper: Wrapper) -> Wrapper:
    return partial(wrapper, AdaBelief)


def _wrap_for_sharded() -> None:
    _wrap(_FOR_SHARDED)


def _wrap(methods: Sequence[_Wrapped]) -> None:
    for module, owner, name, wrapper in methods:
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
            continue
        wrap_method(found, name, wrapper)
