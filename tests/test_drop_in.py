"""Drop-in means drop-in: what scripts do with any torch optimizer works, or is refused at once."""

from __future__ import annotations

import collections
import copy
import enum
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from belief_dist import AdaBelief, ShardedAdaBelief, checkpoint
from belief_dist.sharding.read_guard import ReadGuard

BOTH = [AdaBelief, ShardedAdaBelief]


def params() -> list[nn.Parameter]:
    return list(nn.Linear(3, 3).parameters())


def trained(cls: Any, **options: Any) -> tuple[nn.Linear, Any]:
    model = nn.Linear(3, 3)
    optimizer = cls(model.named_parameters(), **options)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


# - Param groups and numbers

FOREIGN_KEYS = [
    {"lr_scale": 0.75},
    {"group_name": "layer_0"},
    {"max_lr": 0.1, "min_lr": 1e-5, "initial_lr": 1e-3},
    {"rho": 0.05, "adaptive": False, "perturb": True},
    {"base_momentum": 0.85, "max_momentum": 0.95},
    {"decoupled_weight_decay": True, "differentiable": False},
]


@pytest.mark.parametrize("keys", FOREIGN_KEYS, ids=lambda keys: next(iter(keys)))
@pytest.mark.parametrize("cls", BOTH)
def test_keys_of_others_are_kept_and_saved(cls: Any, keys: dict[str, Any]) -> None:
    optimizer = cls([{"params": params(), **keys}])
    assert {key: optimizer.param_groups[0][key] for key in keys} == keys
    again = cls([{"params": params()}])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {key: again.param_groups[0][key] for key in keys} == keys


@pytest.mark.parametrize("key", ["weight_deacy", "beta_s", "rectifi", "amsgrads", "weight_decoupl"])
@pytest.mark.parametrize("cls", BOTH)
def test_slips_of_the_pen_are_refused(cls: Any, key: str) -> None:
    with pytest.raises(TypeError, match=f"has no option {key!r}. Did you mean"):
        cls([{"params": params(), key: 0.1}])


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RAdam])
@pytest.mark.parametrize("cls", BOTH)
def test_groups_of_another_optimizer(cls: Any, other: Any) -> None:
    cls(other(params()).param_groups)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("number", [np.float32(1e-3), np.float64(1e-3), np.float16(1e-3)])
def test_numbers_of_numpy_are_numbers(cls: Any, number: Any) -> None:
    model, optimizer = trained(cls, lr=number, weight_decay=number)
    optimizer.param_groups[0]["lr"] = number * 2
    optimizer.step()
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("eps", [1e-50, 1e-46, 1e-320])
def test_an_eps_that_float32_does_not_have_is_refused(cls: Any, eps: float) -> None:
    with pytest.raises(ValueError, match="in float32 it would be 0"):
        cls(params(), eps=eps)


def test_amsgrad_may_be_switched_on_later() -> None:
    model, optimizer = trained(AdaBelief)
    optimizer.param_groups[0]["amsgrad"] = True
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


# - Loading and copying


@pytest.mark.parametrize("cls", BOTH)
def test_hooks_of_load_state_dict_run_and_count(cls: Any) -> None:
    model, optimizer = trained(cls)
    calls: list[str] = []

    def rename(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("pre")
        states = {
            index: {
                {"exp_avg_var": "exp_avg_sq"}.get(key, key): each for key, each in state.items()
            }
            for index, state in saved["state"].items()
        }
        return {**saved, "state": states}

    def look(loaded: Any) -> None:
        calls.append("post")
        assert float(loaded.state[model.weight]["exp_avg_sq"].max()) == 7.0

    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg_var"] = torch.full_like(state.pop("exp_avg_sq"), 7.0)
    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(look)
    optimizer.load_state_dict(saved)
    assert calls == ["pre", "post"]
    # A refused state leaves the hooks in place.
    with pytest.raises(ValueError, match="needs a dict"):
        optimizer.load_state_dict({"state": {}})
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert calls == ["pre", "post", "pre", "pre", "post"]


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_sharded_optimizer_is_not_copied(clone: Callable[[Any], Any]) -> None:
    _, optimizer = trained(ShardedAdaBelief)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        clone(optimizer)


def test_an_optimizer_without_a_step_lets_torch_swap_its_parameters() -> None:
    model = nn.Linear(3, 3)
    optimizer = AdaBelief(model.parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(nn.Linear(3, 3).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


# - Reads


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_a_forked_child_finds_complete_parameters() -> None:
    param = torch.zeros(3)
    guard = ReadGuard()

    def arrive() -> None:
        param.fill_(1.0)

    guard.expect([param], arrive)
    guard.arm()
    child = os.fork()
    if child == 0:
        os._exit(0 if float(param.sum()) == 3.0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    guard.wait_all()


# - Checkpoints


class Phase(enum.IntEnum):
    WARM = 1


class Colour(enum.Enum):
    RED = "red"


Point = collections.namedtuple("Point", "x y")


class Counted(nn.Linear):
    """Has an extra state of its own."""

    state: Any = None

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


VALUES: list[tuple[Any, Any]] = [
    (np.float64(1.5), 1.5),
    (np.float32(1.5), 1.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (Phase.WARM, 1),
    (Colour.RED, "red"),
    (Point(1, 2.0), (1, 2.0)),
    (collections.defaultdict(int, a=1), {"a": 1}),
    (collections.Counter("aab"), {"a": 2, "b": 1}),
    ([np.float64(1), {"x": Phase.WARM}], [1.0, {"x": 1}]),
]


@pytest.mark.parametrize("value, plain", VALUES, ids=lambda value: type(value).__name__)
def test_what_is_saved_can_be_loaded(tmp_path: Path, value: Any, plain: Any) -> None:
    """As extra, as an extra state of a module, and as a learning rate that NumPy has computed."""
    model = Counted(3, 3)
    model.state = {"value": value}
    optimizer = AdaBelief(model.named_parameters())
    optimizer.param_groups[0]["lr"] = np.float64(0.25)
    optimizer.param_groups[0]["note"] = value
    checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer, extra={"value": value})
    other = Counted(3, 3)
    other.state = {"value": None}
    again = AdaBelief(other.named_parameters())
    loaded = checkpoint.load(tmp_path, model=other, optimizer=again)
    assert loaded.extra == {"value": plain} and type(loaded.extra["value"]) is type(plain)
    assert other.state == {"value": plain}
    assert type(again.param_groups[0]["lr"]) is float and again.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("value", [object(), np.zeros(3), {1, 2}, lambda: None])
def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path, value: Any) -> None:
    model = Counted(3, 3)
    optimizer = AdaBelief(model.named_parameters())
    checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer, keep=1)
    for attempt in ("extra", "state"):
        model.state = value if attempt == "state" else None
        extra = {"value": value} if attempt == "extra" else {}
        with pytest.raises(checkpoint.CheckpointError, match="a checkpoint takes None, numbers"):
            checkpoint.save(tmp_path, 2, model=model, optimizer=optimizer, extra=extra, keep=1)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def stepped(kind: Any) -> tuple[nn.Parameter, Any]:
    """Return a parameter, and its optimizer after one step; the gradient is still there."""
    param = nn.Parameter(torch.ones(3))
    optimizer = kind([param])
    param.grad = torch.ones(3)
    optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("kind", [AdaBelief, ShardedAdaBelief])
def test_states_of_wrappers_are_carried(kind: Any) -> None:
    """Lookahead keeps its slow weights in the state: saved, loaded, and trained on beside them."""
    param, optimizer = stepped(kind)
    optimizer.state[param].update(slow=torch.full((3,), 0.5), since=4)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.state[param].update(slow=torch.zeros(3), since=0)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[param]["slow"], torch.full((3,), 0.5))
    assert optimizer.state[param]["since"] == 4
    optimizer.step()
    assert optimizer.state[param]["step"] == 2
    saved["state"][0]["exp_avg_var"] = saved["state"][0].pop("exp_avg_sq")
    with pytest.raises(ValueError, match="adabelief-pytorch"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("kind", [AdaBelief, ShardedAdaBelief])
def test_options_that_a_saved_group_lacks_get_their_defaults(kind: Any) -> None:
    _, optimizer = stepped(kind)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["maximize"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["maximize"] is False
    optimizer.step()
    del saved["param_groups"][0]["rectify"]
    with pytest.raises(ValueError, match="has no 'rectify'; this is the state_dict of another"):
        optimizer.load_state_dict(saved)
