"""Awkward modules, sharded, are equal bit for bit to one process with every rank's gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from belief_dist import ShardedAdaBelief
from belief_dist.options import DEFAULTS
from tests.harness.models import HYPER
from tests.harness.ranks import run_ranks
from tests.harness.reference import Reference, compare

Loss = Callable[[nn.Module, Tensor], Tensor]


class Looped(nn.Module):
    """One layer used three times, a tied output, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 6)
        self.never = nn.Linear(3, 3)
        self.output = nn.Linear(6, 11, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x.abs().mul(5).long() % 11)
        for _ in range(3):
            x = x + torch.tanh(self.layer(x))
        return self.output(x)


class Strided(nn.Module):
    """Channels-last convolution weights, a transposed matrix, a scalar and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.matrix = nn.Parameter(torch.randn(5, 4).t())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        image = x.reshape(2, 3, 4, 4)
        features = self.conv(image).mean((2, 3))
        return torch.cat([features, self.empty]) @ self.matrix * self.scale


def mixed() -> nn.Module:
    """Layers of three dtypes."""
    return nn.ModuleList(
        [nn.Linear(6, 6), nn.Linear(6, 6, dtype=torch.bfloat16), nn.Linear(6, 6).double()]
    )


def lopsided() -> nn.Module:
    """One parameter larger than all others together, among hundreds of small ones."""
    small = [nn.Linear(2, 2) for _ in range(150)]
    return nn.Sequential(nn.Linear(6, 400), nn.Linear(400, 2), *small)


def plain(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def through_dtypes(model: nn.Module, x: Tensor) -> Tensor:
    for layer in model:
        x = torch.tanh(layer(x.to(layer.weight.dtype)))
    return x.square().mean()


def with_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain(model, x)


def with_checkpoints(model: nn.Module, x: Tensor) -> Tensor:
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=False)
    return x.square().mean()


def compiled(model: nn.Module, x: Tensor) -> Tensor:
    if not hasattr(model, "fast"):
        object.__setattr__(model, "fast", torch.compile(model, backend="aot_eager"))
    return plain(model.fast, x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 6))


CASES: list[tuple[Callable[[], nn.Module], tuple[int, ...], Loss]] = [
    (Looped, (4, 7), plain),
    (Strided, (2, 3, 4, 4), plain),
    (mixed, (4, 6), through_dtypes),
    (lopsided, (4, 6), plain),
    (mlp, (4, 6), with_autocast),
    (mlp, (4, 6), with_checkpoints),
    (mlp, (4, 6), compiled),
]


def equals_one_process(
    make: Callable[[], nn.Module], shape: tuple[int, ...], loss: Loss, stage: Literal[1, 2]
) -> None:
    torch.manual_seed(1)
    model = make()
    # Strides too: another order of memory is another order of summation inside a layer.
    single = copy.deepcopy(model)
    params = list(single.parameters())
    reference = Reference(params, [{**DEFAULTS, **HYPER}] * len(params))
    optimizer = ShardedAdaBelief(model.parameters(), bucket_bytes=300, stage=stage, **HYPER)
    world_size = dist.get_world_size()
    for step in range(3):
        torch.manual_seed(10 + step)
        data = [torch.randn(shape) for _ in range(world_size)]
        grads: list[list[Tensor | None]] = []
        for x in data:
            single.zero_grad()
            loss(single, x).backward()
            grads.append([None if p.grad is None else p.grad.clone() for p in params])
        loss(model, data[dist.get_rank()]).backward()
        optimizer.step()
        reference.step(grads, None, world_size)
        with torch.no_grad():
            for param, value in zip(params, reference.low, strict=True):
                param.copy_(value)
        for ours, theirs in zip(model.parameters(), params, strict=True):
            assert torch.equal(ours, theirs), (make.__name__, loss.__name__, stage, step)
            assert ours.stride() == theirs.stride()
        assert optimizer.grad_norm.item() == reference.norm.item()
        optimizer.zero_grad()
    if make is mlp:
        compare(optimizer, reference, f"{loss.__name__}, stage {stage}")


@pytest.mark.parametrize("world_size", [3, 4])
def test_awkward_modules(world_size: int, tmp_path: Path) -> None:
    run_ranks(
        world_size,
        tmp_path,
        *(partial(equals_one_process, *case, stage) for case in CASES for stage in (1, 2)),
    )
