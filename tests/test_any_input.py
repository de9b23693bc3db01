"""Whatever constructors and `load_state_dict` get: one sentence, or a finite next step."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from belief_dist import AdaBelief, ShardedAdaBelief
from belief_dist.options import DEFAULTS
from tests.harness.nonsense import mutate, nonsense


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Let an error pass that is a sentence for whoever made the mistake, and no other."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (TypeError, ValueError) as error:
        said = str(error)
        assert type(error) in (TypeError, ValueError), f"{type(error).__name__}: {said}"
        assert said.endswith((".", "?")) and " " in said and "\n" not in said, repr(said)
        assert len(said) < 1000, said


def steps_on(optimizer: Any) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(param.isfinite().all() for param in params), params


# - Constructors

RULE = list(DEFAULTS)
OPTIONS: list[tuple[Any, list[str]]] = [
    (AdaBelief, [*RULE, "no_decay", "foreach", "fused", "capturable", "bias_correction", "wd"]),
    (
        ShardedAdaBelief,
        [
            *[*RULE, "no_decay", "stage", "reduction", "reduce_dtype", "master", "state_dtype"],
            *["seed", "bucket_bytes", "max_grad_norm", "max_grad_value", "overlap", "offload"],
            *["check_replicas", "sync_buffers", "timeout", "process_group", "learning_rate"],
            *["micro_batches", "on_desync", "shared_memory"],
        ],
    ),
]


def constructions(number: int) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Give (class, params, options) of calls in which something is nonsense."""
    draw = random.Random(0)
    for _ in range(number):
        cls, names = draw.choice(OPTIONS)
        param = nn.Parameter(torch.ones(3))
        where = draw.choice(["options", "options", "options", "group", "params"])
        chosen = draw.sample(names, draw.choice([1, 1, 2]))
        options = {name: draw.choice(nonsense()) for name in chosen}
        if where == "options":
            yield cls, [param], options
        elif where == "group":
            keys = draw.sample([*RULE, "clip", "params", "weight_deacy", "capturable", 7, None], 1)
            yield cls, [{"params": [param], **{key: draw.choice(nonsense()) for key in keys}}], {}
        else:
            bad = draw.choice(nonsense())
            yield cls, draw.choice([bad, [bad], [param, bad], [{"params": bad}, bad]]), {}


def test_any_argument_of_a_constructor() -> None:
    taken = 0
    for cls, params, options in constructions(300):
        with one_sentence():
            optimizer = cls(params, **options)
            taken += 1
            held = [param for group in optimizer.param_groups for param in group["params"]]
            if options.get("micro_batches") not in (None, 1):
                continue  # gradients that are put there are those of one
            if all(not param.is_meta and param.isfinite().all() for param in held):
                steps_on(optimizer)
    assert taken > 10  # some of it makes sense


# - State dicts


def stepped(cls: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    params = [nn.Parameter(torch.ones(2, 3, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
    optimizer = cls([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}], **options)
    steps_on(optimizer)
    optimizer.zero_grad()
    return optimizer


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "alone": (AdaBelief, {}),
    "amsgrad": (AdaBelief, {"amsgrad": True}),
    "sharded": (ShardedAdaBelief, {}),
    "8 bits": (
        ShardedAdaBelief,
        {"dtype": torch.bfloat16, "master": "remainder8", "state_dtype": "uint8"},
    ),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("kind", KINDS)
def test_any_change_of_a_state_dict(kind: str) -> None:
    """Refused with nothing changed, or loaded, and then a step is finite."""
    cls, options = KINDS[kind]
    draw = random.Random(kind)
    optimizer = stepped(cls, **options)
    good = copy.deepcopy(optimizer.state_dict())
    taken = 0
    for _ in range(250):
        bad = mutate(copy.deepcopy(good), draw)
        try:
            with one_sentence():
                loaded = False
                optimizer.load_state_dict(bad)
                loaded = True
                steps_on(optimizer)
                optimizer.zero_grad()
        finally:
            if not loaded:
                assert same(optimizer.state_dict(), good)
        if loaded:
            taken += 1
            optimizer = stepped(cls, **options)
    assert taken > 20
