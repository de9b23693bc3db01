"""Loading a state_dict: what is damaged or foreign is refused, what real files hold is not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from belief_dist import AdaBelief, ShardedAdaBelief, checkpoint


def label(value: Any) -> str:
    """Name a case by its sentence."""
    return value[:40] if isinstance(value, str) else getattr(value, "__name__", "")


def trained(cls: type, **options: Any) -> Any:
    param = nn.Parameter(torch.ones(3))
    optimizer = cls([param], **options)
    param.grad = torch.ones(3)
    optimizer.step()
    return optimizer


def no_groups(s: dict[str, Any]) -> Any:
    return {"state": s["state"]}


def two_params(s: dict[str, Any]) -> Any:
    s["param_groups"][0]["params"] = [0, 1]
    return s


def of_adam(s: dict[str, Any]) -> Any:
    del s["param_groups"][0]["weight_decouple"]
    return s


def official(s: dict[str, Any]) -> Any:
    s["state"][0]["exp_avg_var"] = s["state"][0].pop("exp_avg_sq")
    return s


def other_shape(s: dict[str, Any]) -> Any:
    s["state"][0]["exp_avg"] = torch.ones(4)
    return s


def step_of(step: Any) -> Callable[[dict[str, Any]], Any]:
    def damage(s: dict[str, Any]) -> Any:
        s["state"][0]["step"] = step
        return s

    return damage


def filled(key: str, value: float) -> Callable[[dict[str, Any]], Any]:
    def damage(s: dict[str, Any]) -> Any:
        s["state"][0][key][-1] = value
        return s

    return damage


def group_with(**options: Any) -> Callable[[dict[str, Any]], Any]:
    def damage(s: dict[str, Any]) -> Any:
        s["param_groups"][0].update(options)
        return s

    return damage


def a_state_more(s: dict[str, Any]) -> Any:
    s["state"][7] = s["state"][0]
    return s


def sparse(s: dict[str, Any]) -> Any:
    s["state"][0]["exp_avg"] = s["state"][0]["exp_avg"].to_sparse()
    return s


FOREIGN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda s: None, "needs a dict with 'state' and 'param_groups', got None"),
    (no_groups, "needs a dict with 'state' and 'param_groups', got ['state']"),
    (two_params, "the saved param groups hold [2] parameters, these hold [1]"),
    (of_adam, "has no 'weight_decouple'; this is the state_dict of another optimizer"),
    (official, "a state of adabelief-pytorch or timm"),
    (other_shape, "its shape is (4,)"),
    (lambda s: {**s, "state": None}, "needs a dict of states and a list of param groups, got None"),
    (lambda s: {**s, "param_groups": [{}]}, "param group 0 must be a dict with a list 'params'"),
    (lambda s: {**s, "state": {0: 3}}, "it must be a dict, got 3"),
    (group_with(params=[True]), "must list each parameter once, by its number, got [True]"),
    (group_with(lr=-1.0), "in saved param group 0, lr must be finite and >= 0, got -1.0"),
    (a_state_more, "there is a state of 7, a parameter that no saved param group lists"),
    (sparse, "it must be a dense tensor, got one torch.sparse_coo"),
    (step_of(-1), "it must be a whole number >= 0, got -1"),
    (step_of(1.5), "it must be a whole number >= 0, got 1.5"),
    (step_of(torch.ones(2)), "it must be a whole number >= 0, got tensor([1., 1.])"),
    (filled("exp_avg_sq", -1.0), "must hold numbers >= 0, got values from -1 to"),
    (filled("exp_avg", float("nan")), "must hold finite numbers, got values from nan to nan"),
]
WRONG_TYPES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (group_with(lr="x"), "in saved param group 0, lr must be a number, got 'x'"),
    (group_with(betas=(0.9,)), "in saved param group 0, betas must be a pair"),
    (group_with(amsgrad=None), "in saved param group 0, amsgrad must be True or False, got None"),
]
FOREIGN_SHARDS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda s: {k: v for k, v in s.items() if k != "sharding"}, "needs its own shard"),
    (lambda s: {**s, "sharding": {**s["sharding"], "rank": 1, "world_size": 2}}, "rank 1 of 2"),
    (lambda s: {**s, "sharding": {**s["sharding"], "layout": "?"}}, "another layout"),
    (
        lambda s: {**s, "sharding": {**s["sharding"], "skipped_steps": -1}},
        "its skipped_steps is -1",
    ),
    (lambda s: {**s, "sharding": {"format": 1}}, "the shard is damaged, its rank is None"),
    (group_with(amsgrad=True), "has amsgrad=True, and this one False; build it alike"),
    (group_with(clip=1), "in saved param group 0, clip must be True or False, got 1"),
]


@pytest.mark.parametrize(
    "cls, damage, sentence",
    [
        *((cls, *case) for cls in (AdaBelief, ShardedAdaBelief) for case in FOREIGN + WRONG_TYPES),
        *((ShardedAdaBelief, *case) for case in FOREIGN_SHARDS),
    ],
    ids=label,
)
def test_foreign_state(cls: type, damage: Callable[[dict[str, Any]], Any], sentence: str) -> None:
    optimizer = trained(cls)
    before = copy.deepcopy(optimizer.state_dict())
    error = TypeError if (damage, sentence) in WRONG_TYPES else ValueError
    with pytest.raises(error, match=re.escape(sentence)):
        optimizer.load_state_dict(damage(copy.deepcopy(before)))
    after = optimizer.state_dict()
    for key, value in before["state"][0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][0][key])), key
    assert after["param_groups"] == before["param_groups"]


def named(s: dict[str, Any]) -> Any:
    """As torch.distributed.checkpoint.state_dict names parameters."""
    return {
        "state": {"w": s["state"][0]},
        "param_groups": [{**s["param_groups"][0], "params": ["w"]}],
    }


REAL: list[Callable[[dict[str, Any]], Any]] = [
    step_of(torch.tensor(4.0)),  # torch's optimizers
    step_of(torch.tensor([4])),  # DeepSpeed
    step_of(np.int64(4)),
    step_of(4.0),  # JSON
    group_with(lr=torch.tensor(0.1), betas=[0.9, 0.99], name="all"),
    filled("exp_avg_sq", float("inf")),  # of a gradient of 1e20
    lambda s: {**s, "state": {0: dict(s["state"][0], slow=torch.ones(3))}},
]


@pytest.mark.parametrize("cls", [AdaBelief, ShardedAdaBelief])
@pytest.mark.parametrize("form", REAL)
def test_what_real_files_hold_is_loaded(cls: type, form: Callable[[Any], Any]) -> None:
    optimizer = trained(cls)
    optimizer.load_state_dict(form(copy.deepcopy(optimizer.state_dict())))
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] in (2, 5)


@pytest.mark.parametrize("state", [None, {}, "named"])
def test_states_may_be_absent_or_named(state: Any) -> None:
    """None is what ZeroRedundancyOptimizer makes of other ranks' states."""
    optimizer = trained(AdaBelief)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(named(saved) if state == "named" else {**saved, "state": {0: state}})
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == (2 if state == "named" else 1)


def test_a_limit_of_a_groups_norm_stays_as_it_was_built(tmp_path: Path) -> None:
    """As that of the model's norm does; whatever the run that has saved had."""

    def built(limit: float | None) -> tuple[nn.Module, ShardedAdaBelief]:
        model = nn.Linear(3, 2)
        groups = [{"params": list(model.named_parameters()), "max_grad_norm": limit}]
        optimizer = ShardedAdaBelief(groups, lr=0.1)
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        return model, optimizer

    for saved, own in ((0.5, None), (None, 0.5), (0.5, 0.25)):
        model, optimizer = built(saved)
        folder = tmp_path / f"{saved}-{own}"
        checkpoint.save(folder, 1, model=model, optimizer=optimizer)
        other_model, other = built(own)
        other.param_groups[0]["lr"] = 0.2
        checkpoint.load(folder, model=other_model, optimizer=other)
        assert (other.param_groups[0]["lr"], other.param_groups[0]["max_grad_norm"]) == (0.1, own)
        if (saved is None) == (own is None):  # else they have other buckets
            other.load_state_dict(optimizer.state_dict())
            assert other.param_groups[0]["max_grad_norm"] == own
        other_model(torch.ones(3)).sum().backward()
        other.step()
