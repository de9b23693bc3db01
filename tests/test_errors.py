"""Bad input gets the one sentence that a user needs, on every rank, before any collective."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn

from belief_dist import AdaBelief, ShardedAdaBelief
from tests.harness.ranks import run_ranks


def p(*shape: int, **kwargs: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, **kwargs))


def label(value: Any) -> str:
    """Name a case by its sentence."""
    return value[:40] if isinstance(value, str) else getattr(value, "__name__", "")


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "lr must be finite and >= 0, got -1.0"),
    ({"lr": float("nan")}, ValueError, "lr must be finite"),
    (
        {"lr": "1e-3"},
        TypeError,
        "lr must be a number, got '1e-3' of type str; write it without quotes",
    ),
    ({"lr": torch.ones(2)}, ValueError, "lr must be one number, got a tensor of shape (2,)"),
    ({"lr": True}, TypeError, "lr must be a number, got True"),
    ({"lr": torch.tensor(True)}, TypeError, "lr must be a real number, got a tensor of dtype"),
    ({"lr": 1e39}, ValueError, "lr=1e+39 is too large: the first step's lr / (1 - betas[0])"),
    ({"lr": 10**400}, ValueError, "lr must be finite, and is larger than any float"),
    ({"weight_decay": 1e39}, ValueError, "weight_decay=1e+39 is too large: a step's decay would"),
    ({"eps": 1e37}, ValueError, "eps=1e+37 is too large: what it adds up to"),
    ({"betas": (0.9,)}, TypeError, "betas must be a pair (beta1, beta2), got (0.9,)"),
    ({"betas": (0.9, 1.0)}, ValueError, "betas[1] must be in [0, 1), got 1.0"),
    ({"betas": (-0.1, 0.9)}, ValueError, "betas[0] must be in [0, 1), got -0.1"),
    ({"eps": 0.0}, ValueError, "eps must be finite and > 0, got 0.0"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and >= 0, got -0.1"),
    ({"rectify": 1}, TypeError, "rectify must be True or False, got 1"),
    (
        {"rectify": True, "amsgrad": True},
        ValueError,
        "rectify=True cannot be combined with amsgrad",
    ),
    ({"fixed_decay": True, "weight_decouple": False}, ValueError, "fixed_decay=True needs"),
    ({"weight_decoupled": True}, TypeError, "has no option 'weight_decoupled'. Did you mean"),
    ({"learning_rate": 0.2}, TypeError, "got 'lr' in two spellings; keep one of them"),
    ({"nonsense": 1}, TypeError, "has no option 'nonsense'. Allowed: amsgrad, betas"),
]

PARAMS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (list, ValueError, "got no parameters; was the iterator already used up"),
    (lambda: p(2), TypeError, "got one tensor; pass [tensor]"),
    (lambda: nn.Linear(2, 2), TypeError, "got a module; pass model.parameters()"),
    (lambda: 3, TypeError, "got int"),
    (lambda: [1.0], TypeError, "can only optimize tensors, got float at position 0"),
    (lambda: {p(2)}, TypeError, "order differs"),
    (lambda: [{"params": {p(2)}}], TypeError, "order differs"),
    (lambda: [torch.ones(2, dtype=torch.int64)], ValueError, "int64; supported"),
    (lambda: [p(2) * 2], ValueError, "it is not a leaf"),
    (lambda: [("a", p(2)), p(2)], ValueError, "1 of 2 parameters are named"),
    (lambda: [{"lr": 0.1}], ValueError, "without 'params'"),
    (lambda: [{"params": None}], TypeError, "needs the 'params' of a group to be a tensor or"),
    (lambda: [{"params": [p(2)]}, p(2)], TypeError, "each param group to be a dict, got Parameter"),
    (lambda: [{"params": [p(2)], 7: 1}], TypeError, "the keys of a param group are strings, got 7"),
    (lambda: [{"params": [p(2)], "lrr": 0.1}], TypeError, "Did you mean 'lr'"),
    (lambda: [{"params": [p(2)], "lr": -2.0}], ValueError, "lr must be finite and >= 0, got -2.0"),
]


def twice() -> list[nn.Parameter]:
    same = p(2, 3)
    return [same, p(1), same]


PARAMS.append((twice, ValueError, "parameter number 2 (shape (2, 3)) twice"))


@pytest.mark.parametrize("cls", [AdaBelief, ShardedAdaBelief])
@pytest.mark.parametrize("options, error, sentence", OPTIONS, ids=label)
def test_options(cls: type, options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=re.escape(sentence)):
        cls([p(2)], **{"lr": 0.1, **options})


@pytest.mark.parametrize("cls", [AdaBelief, ShardedAdaBelief])
@pytest.mark.parametrize("make, error, sentence", PARAMS, ids=label)
def test_params(cls: type, make: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=re.escape(sentence)):
        cls(make())


@pytest.mark.parametrize("more", [{"foreach": True}, {"fused": False}])
def test_capturable_needs_the_kernel(more: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="capturable=True needs the compiled kernel"):
        AdaBelief([p(2)], capturable=True, **more)


@pytest.mark.parametrize("name", ["foreach", "fused", "capturable"])
def test_a_switch_is_no_word(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True.*or .*, got 'no'"):
        AdaBelief([p(2)], **{name: "no"})


ENGINE: list[tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    (
        lambda: [p(2)],
        {"bucket_bytes": 0},
        ValueError,
        "bucket_bytes must be an integer >= 1, got 0",
    ),
    (lambda: [p(2)], {"bucket_bytes": 2.5}, ValueError, "bucket_bytes must be an integer"),
    (
        lambda: [p(2)],
        {"max_grad_norm": 0.0},
        ValueError,
        "max_grad_norm must be > 0 or None, got 0.0",
    ),
    (lambda: [p(2)], {"max_grad_norm": "1.0"}, TypeError, "max_grad_norm must be a number, got"),
    (lambda: [p(2)], {"max_grad_norm": True}, TypeError, "max_grad_norm must be a number, got"),
    (lambda: [p(2)], {"max_grad_value": 1e-50}, ValueError, "max_grad_value must be at least"),
    (lambda: [p(2)], {"timeout": -1}, TypeError, "timeout must be a datetime.timedelta or None"),
    (lambda: [p(2)], {"timeout": timedelta(-1)}, ValueError, "timeout must be > 0 or None, got -1"),
    (lambda: [{"params": []}], {}, ValueError, "got no parameters: every param group is empty"),
    (lambda: [p(2)], {"stage": 3}, ValueError, "stage must be 1 or 2, got 3"),
    (lambda: [p(2)], {"stagee": 2}, TypeError, "has no option 'stagee'. Did you mean 'stage'?"),
    (lambda: [p(2)], {"stage": True}, ValueError, "stage must be 1 or 2, got True"),
    (
        lambda: [p(2)],
        {"reduce_dtype": torch.float16},
        ValueError,
        "must be None, torch.float32, torch.bfloat16 or torch.int8, got torch.float16",
    ),
    (
        lambda: [p(2, dtype=torch.float64)],
        {"reduce_dtype": torch.bfloat16},
        ValueError,
        "would narrow the gradient of float64 parameter",
    ),
    (lambda: [p(2)], {"state_dtype": "int9"}, ValueError, "or torch.uint8, got 'int9'"),
    (lambda: [p(2)], {"state_dtype": torch.int8}, ValueError, "or torch.uint8, got torch.int8"),
    (lambda: [p(2)], {"master": "fp16"}, ValueError, "'remainder' or 'remainder8', got 'fp16'"),
    (lambda: [p(2)], {"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
    (
        lambda: [p(2, dtype=torch.float64)],
        {"state_dtype": "bfloat16"},
        ValueError,
        "state_dtype=torch.bfloat16 would narrow the states of float64 parameter number 0",
    ),
    (
        lambda: [p(2, dtype=torch.float16)],
        {"master": "remainder8"},
        ValueError,
        "master='remainder8' cannot serve float16 parameter number 0",
    ),
    (lambda: [p(2)], {"reduction": "ring"}, ValueError, "must be 'ordered' or 'native'"),
    (lambda: [p(2)], {"shared_memory": "gpu"}, TypeError, "must be True, False or 'cuda'"),
    (
        lambda: [p(2)],
        {"shared_memory": "cuda", "reduction": "native"},
        ValueError,
        "shared_memory='cuda' needs reduction='ordered'",
    ),
    (lambda: [p(2)], {"offload": "nvme"}, ValueError, "offload must be None, 'cpu', a fraction of"),
    (lambda: [p(2)], {"offload": 1}, ValueError, "leave the device (an integer > 1), got 1."),
    (lambda: [p(2)], {"offload": 1.5}, ValueError, "a float > 0 and <= 1"),
    (lambda: [p(2)], {"offload": True}, ValueError, "got True"),
    (
        lambda: [p(2)],
        {"offload": 0.5, "check_states": True},
        ValueError,
        "check_states does not go together with offload=0.5",
    ),
    (lambda: [p(2), p(2, device="meta")], {}, ValueError, "on one device, got cpu, meta"),
    (lambda: [p(2, device="meta")], {}, ValueError, "needs real parameters"),
]


@pytest.mark.parametrize("make, options, error, sentence", ENGINE, ids=label)
def test_engine(
    make: Callable[[], Any], options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=re.escape(sentence)):
        ShardedAdaBelief(make(), **options)


@pytest.mark.parametrize("cls", [AdaBelief, ShardedAdaBelief])
def test_beta1_of_zero_warns(cls: type) -> None:
    with pytest.warns(UserWarning, match="makes the gradient its own prediction"):
        cls([p(2)], betas=(0.0, 0.9))


@pytest.mark.parametrize("cls", [AdaBelief, ShardedAdaBelief])
def test_other_spellings_are_accepted_with_a_warning(cls: type) -> None:
    with pytest.warns(UserWarning, match="'decoupled_decay' is spelled 'weight_decouple'"):
        optimizer = cls([p(2)], decoupled_decay=False)
    assert optimizer.param_groups[0]["weight_decouple"] is False


def test_sparse_gradients() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = AdaBelief(table.parameters())
    with pytest.raises(RuntimeError, match="build the embedding with sparse=False"):
        table(torch.tensor([1])).sum().backward()
        optimizer.step()


def test_sharding_needs_an_initialized_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2; call torch.distributed.init_process"):
        ShardedAdaBelief([p(2)])


NEW_GROUPS: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda old: {"params": [old]}, ValueError, "parameter number 0 (shape (2,)) twice"),
    (lambda _: {"params": [p(3)], "lr": -1.0}, ValueError, "lr must be finite and >= 0, got -1.0"),
    (
        lambda _: {"params": [p(3)], "max_grad_norm": 0.0},
        ValueError,
        "max_grad_norm of a param group must be > 0 or None, got 0.0",
    ),
    (
        lambda _: {"params": [p(3)], "max_grad_norm": 1.0, "clip": False},
        ValueError,
        "leave one of them out",
    ),
    (lambda _: {"params": [p(3)], "clip": 1}, TypeError, "clip of a param group must be True or"),
    (lambda _: {"params": [p(3, device="meta")]}, ValueError, "on one device, got cpu, meta"),
    (lambda _: [p(3)], TypeError, "each param group to be a dict, got list"),
]


@pytest.mark.parametrize("make, error, sentence", NEW_GROUPS, ids=label)
def test_new_groups(make: Callable[[Any], Any], error: type[Exception], sentence: str) -> None:
    param = p(2)
    optimizer = ShardedAdaBelief([param])
    with pytest.raises(error, match=re.escape(sentence)):
        optimizer.add_param_group(make(param))
    assert len(optimizer.param_groups) == len(optimizer.state_dict()["param_groups"]) == 1
    param.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


@pytest.mark.parametrize("stage", [1, 2])
def test_no_new_group_between_backward_and_step(stage: Literal[1, 2]) -> None:
    param = p(2)
    optimizer = ShardedAdaBelief([param], stage=stage)
    param.sum().backward()
    with pytest.raises(RuntimeError, match=r"came between backward and step.*call it after step"):
        optimizer.add_param_group({"params": [p(3)]})
    optimizer.step()
    optimizer.add_param_group({"params": [p(3)]})
    assert len(optimizer.param_groups) == 2


def test_offload_on_one_thread_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="start with OMP_NUM_THREADS=4"):
        ShardedAdaBelief([p(2)], offload="cpu")


# - Ranks that differ


def expect(sentence: str, make: Callable[[int], Any]) -> None:
    """Every rank gets the sentence, although only the last one is different."""
    odd = dist.get_rank() == dist.get_world_size() - 1
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        make(odd)


def build(odd: bool, params: Callable[[bool], Any], **options: Callable[[bool], Any]) -> None:
    ShardedAdaBelief(params(odd), **{key: value(odd) for key, value in options.items()})


def same(odd: bool) -> list[tuple[str, nn.Parameter]]:
    return [("a", p(2)), ("b", p(3))]


def test_ranks_that_disagree(tmp_path: Path) -> None:
    def case(sentence: str, params: Callable[[bool], Any], **options: Any) -> Any:
        return partial(expect, sentence, partial(build, params=params, **options))

    run_ranks(
        3,
        tmp_path,
        case("the number of parameters: the group's rank 0 has 2, rank 2 has 1", one_less),
        case("disagree about the parameter", other_param_shape),
        case("disagree about the parameter", other_order),
        case("disagree about the parameter", other_dtype),
        # What is equal is left out.
        case("of param group: the group's rank 0 has lr=", same, lr=other_lr),
        case("bucket_bytes", same, bucket_bytes=other_bytes),
        case("lr must be finite and >= 0, got -1.0", same, lr=bad_lr),
        case("kind=''), rank 2 has ParamSpec", frozen_here),
        loads_together,
    )


def one_less(odd: bool) -> list[tuple[str, nn.Parameter]]:
    return same(odd)[: 1 if odd else 2]


def other_param_shape(odd: bool) -> list[tuple[str, nn.Parameter]]:
    return [("a", p(2)), ("b", p(4 if odd else 3))]


def other_order(odd: bool) -> list[tuple[str, nn.Parameter]]:
    return same(odd)[:: -1 if odd else 1]


def other_dtype(odd: bool) -> list[tuple[str, nn.Parameter]]:
    return [("a", p(2, dtype=torch.bfloat16 if odd else torch.float32))]


def frozen_here(odd: bool) -> list[tuple[str, nn.Parameter]]:
    return [("a", p(2).requires_grad_(not odd))]


def other_lr(odd: bool) -> float:
    return 0.1 if odd else 0.2


def bad_lr(odd: bool) -> float:
    return -1.0 if odd else 0.2


def other_bytes(odd: bool) -> int:
    return 100 if odd else 200


def loads_together() -> None:
    """One rank's bad shard is refused by all, and nobody has changed anything."""
    param = p(1000)
    optimizer = ShardedAdaBelief([param])
    param.grad = torch.ones(1000)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"].zero_()
    if dist.get_rank() == 1:
        saved["sharding"]["layout"] = "?"
    with pytest.raises(ValueError, match="another layout"):
        optimizer.load_state_dict(saved)
    saved["sharding"] = optimizer.state_dict()["sharding"]
    if dist.get_rank() == 1:
        saved["state"][0]["exp_avg"] = "damaged"
    with pytest.raises(ValueError, match=r"must be a tensor, got 'damaged'"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[param]["exp_avg"].count_nonzero() == len(
        optimizer.state[param]["exp_avg"]
    )
