"""The moment when a DeepSpeed engine that is being built gets a ShardedAdaBelief."""

from __future__ import annotations

from typing import Any

from belief_dist.deepspeed.stage0.compatibility import check_engine, max_grad_norm_of
from belief_dist.deepspeed.stage0.driver import EngineDriver
from belief_dist.deepspeed.stage0.loss_scale import scaler_of
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.rank_checks import compare_ranks, raise_together


def attach(engine: Any, optimizer: ShardedAdaBelief) -> None:
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
    raise_together(optimizer.comm, problem)
    micro_batches = engine.gradient_accumulation_steps()
    compare_ranks(
        optimizer.comm,
        {"(gradient_accumulation_steps, gradient_clipping)": [(micro_batches, max_grad_norm)]},
    )
    if isinstance(optimizer.driver, EngineDriver):  # of an engine that was built before
        optimizer.driver.close()
    # The engine drives such a scaler already: it scales the loss, and lets it make the step.
    engine.torch_autocast_z0_gradscaler = scaler = scaler_of(engine)
    optimizer.drive_by(EngineDriver(engine, optimizer, max_grad_norm, scaler))
    names = {id(param): name for name, param in engine.module.named_parameters()}
    for group in optimizer.param_groups:
        # Under which a checkpoint holds them, and errors name them.
        group["param_names"] = [names[id(param)] for param in group["params"]]
    groups = {spec.group for spec in optimizer.layout.params}
    has_gaps = len(groups) <= max(groups, default=-1)
    # The engine has cast and broadcast the model since, or has dropped empty param groups.
    if engine.client_optimizer is optimizer or has_gaps:
        optimizer.rebuild()
