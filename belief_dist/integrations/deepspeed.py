"""What DeepSpeed must know of an optimizer before its ZeRO stages accept it."""

from __future__ import annotations

import re
import sys

from torch.optim import Optimizer

from belief_dist.integrations.rehearsal import is_called_by

_OLDEST = (0, 18)


def register_zero_optimizer(cls: type[Optimizer]) -> None:
    """Add `cls` to the optimizers that DeepSpeed's ZeRO stages accept as tested.

    Without it a user would have to write `"zero_allow_untested_optimizer": true`. The optimizers
    call this in their constructors, which is early enough: DeepSpeed checks what it constructed or
    was given afterwards, by exact type. Where DeepSpeed is not loaded nothing happens; it is never
    imported from here.

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
