"""Wrappers of the engine's methods: what DeepSpeed would do once more is left out.

An engine whose optimizer is no ShardedAdaBelief runs DeepSpeed's own methods.
"""

from __future__ import annotations

from typing import Any

from belief_dist.deepspeed.stage0.driver import driver_of
from belief_dist.deepspeed.wrapping import Wrapper
from belief_dist.sharded import ShardedAdaBelief


def attach_or_check(original: Wrapper, engine: Any, optimizer: Any) -> Any:
    """Attach a ShardedAdaBelief instead of choosing a wrapper for it.

    An engine looks at its optimizer here, once, whether it has constructed it or was given it,
    after it has cast and broadcast the model. None means that it takes the optimizer as it is.
    """
    if not isinstance(optimizer, ShardedAdaBelief):
        return original(engine, optimizer)
    from belief_dist.deepspeed.stage0.attach import attach  # imports DeepSpeed

    return attach(engine, optimizer)


def allreduce_gradients(original: Wrapper, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Do nothing: the optimizer's hooks have started all reductions in backward."""
    return original(engine, *args, **kwargs) if driver_of(engine) is None else None


def clip_fp32_gradients(original: Wrapper, engine: Any) -> Any:
    """Do nothing: the optimizer clips the mean gradient in its update."""
    return original(engine) if driver_of(engine) is None else None


def zero_grad(original: Wrapper, engine: Any) -> Any:
    """Forget all gradients of the model, and what has been reduced of them."""
    if driver_of(engine) is not None:
        engine.optimizer.zero_grad()
    return original(engine)


def save_checkpoint(original: Wrapper, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """See `checkpoints.save_checkpoint`."""
    if driver_of(engine) is None:
        return original(engine, *args, **kwargs)
    from belief_dist.deepspeed.stage0 import checkpoints  # imports torch.distributed.checkpoint

    return checkpoints.save_checkpoint(original, engine, *args, **kwargs)


def load_checkpoint(original: Wrapper, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """See `checkpoints.load_checkpoint`."""
    if driver_of(engine) is None:
        return original(engine, *args, **kwargs)
    from belief_dist.deepspeed.stage0 import checkpoints  # imports torch.distributed.checkpoint

    return checkpoints.load_checkpoint(original, engine, *args, **kwargs)
