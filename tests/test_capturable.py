"""Steps that are counted on the device: the same training, and one tensor that counts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from belief_dist import AdaBelief

OPTIONS: dict[str, Any] = {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}


def pair(**options: Any) -> tuple[list[nn.Parameter], AdaBelief, list[nn.Parameter], AdaBelief]:
    made = []
    for capturable in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (300,), ())]
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
        made += [params, AdaBelief(groups, **OPTIONS, **options, capturable=capturable)]
    return tuple(made)


def train(params: list[nn.Parameter], optimizer: AdaBelief, steps: int, unused: int = -1) -> None:
    for step in range(steps):
        for index, param in enumerate(params):
            generator = torch.Generator().manual_seed(10 * step + index)
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float32)
            if index == unused and step == 1:
                param.grad = None
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"rectify": True}, {"amsgrad": True}])
@pytest.mark.parametrize("unused", [-1, 0])
def test_trains_the_same(options: dict[str, Any], unused: int) -> None:
    ours, plain, others, capturable = pair(**options)
    train(ours, plain, 8, unused)
    train(others, capturable, 8, unused)
    for a, b in zip(ours, others, strict=True):
        # Powers of beta may differ in the last place of a float64 number.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        assert plain.state[a]["step"] == int(capturable.state[b]["step"])


def test_parameters_share_a_count_that_is_changed_in_place() -> None:
    _, _, params, optimizer = pair()
    train(params, optimizer, 2)
    first, second, other = (optimizer.state[param]["step"] for param in params)
    assert first is second and first is not other
    train(params, optimizer, 1)
    assert optimizer.state[params[0]]["step"] is first and int(first) == 3


def test_the_learning_rate_is_read_from_its_tensor() -> None:
    param = nn.Parameter(torch.ones(4))
    lr = torch.tensor(0.0)
    optimizer = AdaBelief([param], lr=lr, capturable=True)
    param.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(param, torch.ones(4))
    lr.fill_(0.1)
    optimizer.step()
    assert (param < 0.95).all()


def test_copies_can_step() -> None:
    for optimizer in pair()[1::2]:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        train(params, optimizer, 1)
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            copies = [p for group in other.param_groups for p in group["params"]]
            train(copies, other, 1)
            assert int(other.state[copies[0]]["step"]) == 2


def test_a_state_that_somebody_has_looked_for_does_no_harm() -> None:
    _, _, params, optimizer = pair()
    assert optimizer.state[params[0]] == {}
    train(params, optimizer, 2, unused=0)
    assert int(optimizer.state[params[1]]["step"]) == 2


def test_steps_are_saved_as_numbers() -> None:
    _, _, params, optimizer = pair()
    torch.set_default_dtype(torch.bfloat16)  # which cannot count beyond 256
    try:
        train(params, optimizer, 300)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [state["step"] for state in optimizer.state_dict()["state"].values()] == [300] * 3


def test_a_group_cannot_be_capturable_alone() -> None:
    with pytest.raises(ValueError, match="pass it to the constructor"):
        AdaBelief([{"params": [nn.Parameter(torch.ones(2))], "capturable": True}])


def test_counts_survive_saving() -> None:
    ours, plain, others, capturable = pair()
    train(ours, plain, 3)
    train(others, capturable, 3)
    states = capturable.state_dict()
    for saved in (states, plain.state_dict()):
        for target in pair()[1::2]:
            target.load_state_dict(saved)
            params = [p for group in target.param_groups for p in group["params"]]
            train(params, target, 1)
            counts = [target.state[param]["step"] for param in params]
            assert list(map(int, counts)) == [4, 4, 4]
            assert all(isinstance(c, Tensor) == (target._capturable) for c in counts)
