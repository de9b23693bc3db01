"""Computes the gradients of a batch twice, and tells which of them have other bits.

What a device computes wrongly before gradients are summed has no copy to compare with. Done again
from the same weights, batch and random numbers, it has: where bits differ, a kernel of the model is
not deterministic, or the device is faulty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def differing_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[str]:
    """Return the parameters whose gradients are not the same bits when they are computed again.

    Between two steps, at any moment: `param.grad`, the optimizer and its reductions notice nothing,
    nothing is sent, and buffers and random numbers are afterwards as they were before. Each rank
    does it for itself. It takes the time of two forward and backward passes, and memory for two
    copies of the gradients.

    Args:
        model: Its parameters that require gradients are looked at.
        loss: Computes the loss of a batch, one element, from the beginning: with the batch that it
            had the first time. Reentrant activation checkpointing does not work in it.

    Returns:
        Names of parameters, in the model's order; empty if all bits are equal, NaN included.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    params = [param for _, param in named]
    devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def gradients() -> tuple[Tensor | None, ...]:
        try:
            with torch.random.fork_rng(devices), torch.enable_grad():
                return torch.autograd.grad(loss(), params, allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    pairs = zip(named, gradients(), gradients(), strict=True)
    return [name for (name, _), first, second in pairs if not _same_bits(first, second)]


def _same_bits(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    words = [each.detach().contiguous().view(-1).view(torch.uint8) for each in (first, second)]
    return torch.equal(*words)
