"""What a `torch.amp.GradScaler` and the optimizer tell each other in a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from belief_dist.engine_options import EngineOptions
from belief_dist.sharding.step_consensus import Verdict


def check_scaler(scaler: GradScaler, optimizer: Optimizer, options: EngineOptions) -> None:
    """Refuse a scaler that the optimizer cannot work with.

    Raises:
        RuntimeError: Gradients have been unscaled already, or travel as int8.
    """
    if scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED:
        raise RuntimeError(
            "ShardedAdaBelief divides by the loss scale itself, after gradients were summed "
            "over the ranks: leave out scaler.unscale_(optimizer), and clip by max_grad_norm."
        )
    if options.reduce_dtype == torch.int8:
        raise RuntimeError(
            "reduce_dtype=torch.int8 does not work with a GradScaler, whose changing scale "
            "would spoil the errors that are fed back; use bfloat16 parameters without one."
        )


def tell_scaler(scaler: GradScaler, optimizer: Optimizer, verdict: Tensor) -> None:
    """Tell the scaler whether gradients were finite, without waiting for the device."""
    not_finite = (verdict == Verdict.NOT_FINITE).to(torch.float32)
    scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {
        verdict.device: not_finite
    }
    if scaler._growth_tracker is not None:
        # Ranks that gave the step up do not count it as one that went well.
        scaler._growth_tracker -= (verdict == Verdict.GIVEN_UP).to(scaler._growth_tracker)
