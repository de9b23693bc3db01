"""Models under DDP and FSDP2, whose states go through torch's own functions and come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from belief_dist import AdaBelief
from tests.harness.models import HYPER


def wrapped(kind: str, seed: int) -> tuple[nn.Module, AdaBelief]:
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    if kind == "DDP":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model)
    return model, AdaBelief(model.parameters(), **HYPER)


def steps(model: nn.Module, optimizer: AdaBelief, first: int, count: int) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(4, 7, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach().clone()


def continues(kind: str, full: bool, run: Path) -> None:
    """A state that has come through torch's functions goes on as if nothing had happened."""
    options = StateDictOptions(full_state_dict=full)
    model, optimizer = wrapped(kind, 0)
    steps(model, optimizer, 0, 3)
    before = [whole(p) for p in model.parameters()]
    saved = {
        "model": get_model_state_dict(model, options=options),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }
    assert all(torch.equal(whole(p), b) for p, b in zip(model.parameters(), before, strict=True))
    other, other_optimizer = wrapped(kind, 1)
    if full:
        target = saved
    else:
        dcp.save(saved, checkpoint_id=run)
        target = {
            "model": get_model_state_dict(other),
            "optim": get_optimizer_state_dict(other, other_optimizer),
        }
        # The fresh optimizer's states were made by a fake step, which has not counted.
        assert {entry["step"] for entry in target["optim"]["state"].values()} == {0}
        dcp.load(target, checkpoint_id=run)
    set_model_state_dict(other, target["model"], options=options)
    set_optimizer_state_dict(other, other_optimizer, target["optim"], options=options)
    assert {int(state["step"]) for state in other_optimizer.state.values()} == {3}
    for each in (model, optimizer), (other, other_optimizer):
        steps(*each, 3, 2)  # type: ignore[arg-type]
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(ours), whole(theirs)), kind
        for key in ("exp_avg", "exp_avg_sq"):
            a, b = optimizer.state[ours][key], other_optimizer.state[theirs][key]
            assert torch.equal(whole(a), whole(b)), f"{kind} {key}"
