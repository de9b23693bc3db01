"""The loss scale of float16, in the hands of torch's GradScaler.

At ZeRO stage 0 the engine knows how to drive one: it scales the loss in `engine.backward`, and lets
it make the step. Our update divides by the scale itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler


class EngineScaler(GradScaler):
    """A `GradScaler` with DeepSpeed's options.

    Args:
        device: The type of device.
        scale: To begin with.
        window: So many good steps in a row double the scale.
        least: The scale is never smaller.
        most: The scale is never larger. Equal to `least`, it is static.
    """

    def __init__(self, device: str, scale: float, window: int, least: float, most: float) -> None:
        super().__init__(device, init_scale=scale, growth_interval=window)
        self._least, self._most = least, most

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing, before the engine clips: the optimizer divides, and clips itself."""

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Adapt the scale to the step that was just made or skipped."""
        super().update(new_scale)
        assert self._scale is not None
        self._scale.clamp_(self._least, self._most)


def scaler_of(engine: Any) -> EngineScaler | None:
    """Return the scaler that a DeepSpeed engine needs, or None for 32 bits and bfloat16."""
    device = engine.device.type
    if engine.fp16_enabled():
        options = engine._config.float16_config
        if engine.dynamic_loss_scale():
            begin = 2.0**options.initial_scale_power
            least, most = options.min_loss_scale, math.inf
        else:
            begin = least = most = options.loss_scale
        return EngineScaler(device, begin, options.loss_scale_window, least, most)
    if engine.torch_autocast_z0_gradscaler is not None:  # torch_autocast with float16
        scaler: GradScaler = engine.torch_autocast_z0_gradscaler
        begin, window = scaler.get_scale(), scaler.get_growth_interval()
        return EngineScaler(device, begin, window, 0.0, math.inf)
    return None
