"""float16 by DeepSpeed's own loss scale."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from belief_dist.deepspeed.patching import Around


def refuse_scale_at_stage0(
    served: type[Optimizer], original: Around, engine: Any, optimizer: Any, *args: Any
) -> Any:
    """Refuse a loss scale at stage 0: DeepSpeed divides gradients by it, and scales no loss.

    (Its pull request 8393.) Adam does not notice, whose update does not depend on the gradients'
    scale; in AdaBelief eps would weigh as much more as the scale's square.
    """
    if isinstance(optimizer, served) and engine.fp16_enabled():
        if engine.dynamic_loss_scale() or engine.loss_scale() != 1.0:
            raise ValueError(
                'AdaBelief is wrong with "fp16" at ZeRO stage 0, where DeepSpeed divides gradients '
                "by a loss scale that it never multiplied the loss by: use stage 1, "
                '"type": "ShardedAdaBelief", or "bf16"; or, without a scale, "fp16": '
                '{"enabled": true, "loss_scale": 1}.'
            )
    return original(engine, optimizer, *args)
