"""Small models and gradients that several tests share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from belief_dist.rule import compute_dtype

# A large eps on purpose: with 1e-16 a step does not depend on the scale of the gradient, so that a
# forgotten division by the world size would pass unseen. The lr is large enough to see every step.
HYPER = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-2, "weight_decay": 0.1}

# Shards cut through tensors, and the last ones hold padding; scalar and empty tensors included.
SHAPES = [(17, 3), (), (5,), (1,), (4, 2, 3), (0, 3), (129,), (33, 31)]


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    """Return parameters that are equal on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]


def make_grad(shape: tuple[int, ...], step: int, rank: int, index: int, micro: int = 0) -> Tensor:
    """Return a gradient over many decades: sums of such numbers depend on their order."""
    return _drawn(shape, step, rank, index, micro).clone()


@functools.cache
def _drawn(shape: tuple[int, ...], step: int, rank: int, index: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(
        1 + step + 100 * rank + 10_000 * index + 10**6 * micro
    )
    exponent = torch.empty(shape).uniform_(-3, 1, generator=generator)
    return torch.randn(shape, generator=generator) * 10**exponent


def rank_order_sum(grads: list[Tensor]) -> Tensor:
    """Add in rank order, widened to the compute dtype, every addition rounded on its own."""
    dtype = compute_dtype(grads[0].dtype)
    total = grads[0].to(dtype, copy=True)
    for grad in grads[1:]:
        total += grad.to(dtype)
    return total
