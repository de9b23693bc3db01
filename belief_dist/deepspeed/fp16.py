"""float16 with DeepSpeed's own loss scale."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from belief_dist.deepspeed.wrapping import Wrapper


def refuse_scale_at_stage0(
    optimizer_cls: type[Optimizer], original: Wrapper, engine: Any, optimizer: Any, *args: Any
) -> Any:
    """Refuse a loss scale at stage 0, where DeepSpeed divides gradients by it but scales no loss.

    See DeepSpeed's pull request 8393. Adam hides the error, as its update does not depend on the
    scale of the gradients; in AdaBelief, eps would in effect grow by the square of the loss scale.
    """
    if isinstance(optimizer, optimizer_cls) and engine.fp16_enabled():
        if engine.dynamic_loss_scale() or engine.loss_scale() != 1.0:
            raise ValueError(
                'AdaBelief is wrong with "fp16" at ZeRO stage 0, where DeepSpeed divides gradients '
                "by a loss scale that it never multiplied the loss by: use stage 1, "
                '"type": "ShardedAdaBelief", or "bf16"; or, without a scale, "fp16": '
                '{"enabled": true, "loss_scale": 1}.'
            )
    return original(engine, optimizer, *args)
