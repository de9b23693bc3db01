"""What DeepSpeed must know of an optimizer before its ZeRO stages accept it."""

from __future__ import annotations

import sys

from torch.optim import Optimizer


def register_zero_optimizer(cls: type[Optimizer]) -> None:
    """Add `cls` to the optimizers that DeepSpeed's ZeRO stages accept as tested.

    Without it a user would have to write `"zero_allow_untested_optimizer": true`. The optimizers
    call this in their constructors, which is early enough: DeepSpeed checks what it constructed or
    was given afterwards, by exact type. Where DeepSpeed is not loaded nothing happens; it is never
    imported from here.

    Args:
        cls: The optimizer's class itself; DeepSpeed does not look at base classes.
    """
    zero_utils = sys.modules.get("deepspeed.runtime.zero.utils")
    supported = getattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None and cls not in supported:
        supported.append(cls)


def extend_deepspeed(cls: type[Optimizer]) -> None:
    """Have DeepSpeed offload, save and load optimizers of this class as it does its own.

    Like `register_zero_optimizer`, in memory, from constructors, and only where it is loaded.
    """
    if "deepspeed.runtime.engine" in sys.modules:
        from belief_dist.integrations.deepspeed_checkpoint import extend_checkpoints
        from belief_dist.integrations.deepspeed_offload import extend_offload

        extend_offload(cls)
        extend_checkpoints(cls)
