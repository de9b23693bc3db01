"""What a `torch.amp.GradScaler` and the optimizer tell each other in a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from belief_dist.engine_options import EngineOptions


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


def tell_scaler(scaler: GradScaler, optimizer: Optimizer, skip: Tensor) -> None:
    """Tell the scaler whether the step was skipped, without waiting for the device."""
    checks = {skip.device: skip.to(torch.float32)}
    scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = checks
