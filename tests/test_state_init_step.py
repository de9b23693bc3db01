"""Steps that frameworks take only to make an optimizer create states leave no other trace."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from belief_dist import AdaBelief
from tests.harness.models import HYPER


def make_trained(steps: int) -> tuple[torch.nn.Linear, AdaBelief]:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = AdaBelief(model.parameters(), **HYPER)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def initialize_optimizer_states(optimizer: AdaBelief) -> None:
    """Do what DeepSpeed's stage-0 wrapper does in a function of this name."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()


def test_a_rehearsal_creates_clean_states():
    model, optimizer = make_trained(0)
    before = [p.detach().clone() for p in model.parameters()]
    initialize_optimizer_states(optimizer)
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, old)
        assert optimizer.state[param]["step"] == 0
        assert not optimizer.state[param]["exp_avg"].any()
        assert not optimizer.state[param]["exp_avg_sq"].any()


def test_a_later_step_from_there_is_a_real_one():
    _, optimizer = make_trained(1)
    initialize_optimizer_states(optimizer)
    assert {state["step"] for state in optimizer.state.values()} == {2}


def test_a_real_first_step_on_zero_gradients_counts():
    model, optimizer = make_trained(0)
    before = model.weight.detach().clone()
    model(torch.zeros(4, 5)).sum().mul(0).backward()
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 1
    decay = 1 - HYPER["lr"] * HYPER["weight_decay"]
    torch.testing.assert_close(model.weight.detach(), before * decay)


def test_distributed_checkpoint_loads_into_a_fresh_optimizer():
    model, optimizer = make_trained(3)
    saved = get_optimizer_state_dict(model, optimizer)
    fresh_model, fresh = make_trained(0)
    before = fresh_model.weight.detach().clone()
    set_optimizer_state_dict(fresh_model, fresh, saved)
    assert torch.equal(fresh_model.weight, before)
    for param, other in zip(model.parameters(), fresh_model.parameters(), strict=True):
        for key, value in optimizer.state[param].items():
            loaded = fresh.state[other][key]
            assert torch.equal(torch.as_tensor(loaded), torch.as_tensor(value)), key
