"""Gradients that are computed again have the same bits, or their parameters are named."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from belief_dist import ShardedAdaBelief
from belief_dist.replay import differing_gradients
from tests.harness.ranks import run_ranks


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.GELU(), nn.Linear(9, 3)
    )


class Faulty(torch.autograd.Function):
    """An identity whose backward flips a bit of every second gradient that it sees."""

    calls = 0

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Tensor:
        Faulty.calls += 1
        grad = grad.clone()
        if Faulty.calls % 2 == 0:
            grad.view(torch.int32).view(-1)[0] ^= 1 << 22
        return grad


def test_a_model_with_dropout_and_statistics_is_computed_again() -> None:
    model, inputs = model_of(), torch.randn(5, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert differing_gradients(model, lambda: model(inputs).square().sum()) == []
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


def test_what_has_other_bits_is_named() -> None:
    model, inputs = model_of(), torch.randn(5, 6)
    model[4].weight.requires_grad_(False)

    def loss() -> Tensor:
        hidden = model[1](model[0](inputs))
        return model[4](Faulty.apply(hidden)).square().sum()

    assert differing_gradients(model, loss) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_loss_that_raises_leaves_everything() -> None:
    model, inputs = model_of(), torch.randn(5, 6)
    before = model[1].running_mean.clone()

    def loss() -> Tensor:
        model(inputs)
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="out of memory"):
        differing_gradients(model, loss)
    assert torch.equal(model[1].running_mean, before)


def training_does_not_notice(options: dict[str, Any]) -> None:
    ended = []
    for looks in (False, True):
        model = model_of()
        optimizer = ShardedAdaBelief(model.named_parameters(), lr=0.01, bucket_bytes=128, **options)
        for step in range(4):
            torch.manual_seed(10 * step + dist.get_rank())
            inputs = torch.randn(5, 6)
            loss = lambda: model(inputs).square().sum()  # noqa: E731, B023
            if looks:  # while parameters may be on their way
                assert differing_gradients(model, loss) == []
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.wait_pending()
        ended.append([value.clone() for value in model.state_dict().values()])
    assert all(map(torch.equal, *ended))


def test_training_does_not_notice(tmp_path: Path) -> None:
    forms: list[dict[str, Any]] = [{}, {"stage": 2}, {"micro_batches": 2}]
    run_ranks(2, tmp_path, *(partial(training_does_not_notice, form) for form in forms))
