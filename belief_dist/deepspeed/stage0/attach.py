"""The moment when a DeepSpeed engine that is being built gets a ShardedAdaBelief."""

from __future__ import annotations

from typing import Any

from belief_dist.deepspeed.stage0.compatibility import check_engine, max_grad_norm_of
from belief_dist.deepspeed.stage0.engine import ShardedEngine
from belief_dist.deepspeed.stage0.loss_scale import scaler_of
from belief_dist.deepspeed.stage0.optimizer import EngineOptimizer
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.step_consensus import compare_ranks, raise_together


def enter(engine: Any, optimizer: ShardedAdaBelief) -> None:
    """Make `optimizer` the one that reduces, clips, updates and saves for `engine`.

    Args:
        engine: A `DeepSpeedEngine` whose model is on its device, in its dtype, and broadcast.
        optimizer: With parameters of this model.

    Raises:
        ValueError: On every rank: the engine is set up for something that it would do a second
            time, or that does not go together with the optimizer.
        RuntimeError: This version of DeepSpeed has not what is needed.
    """
    problem: Exception | None = None
    max_grad_norm = None
    try:
        check_engine(engine, optimizer)
        max_grad_norm = max_grad_norm_of(engine, optimizer)
    except (ValueError, RuntimeError) as error:
        problem = error
    raise_together(optimizer.links, problem)
    micro_batches = engine.gradient_accumulation_steps()
    compare_ranks(
        optimizer.links,
        {"(gradient_accumulation_steps, gradient_clipping)": [(micro_batches, max_grad_norm)]},
    )
    engine.__class__ = ShardedEngine
    optimizer.__class__ = EngineOptimizer
    assert isinstance(optimizer, EngineOptimizer)
    engine.torch_autocast_z0_gradscaler = scaler_of(engine)
    optimizer.attach(engine, max_grad_norm)
