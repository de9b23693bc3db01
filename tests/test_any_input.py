"""Whatever constructors and `load_state_dict` get: one sentence, or a finite next step."""

from __future__ import annotations

import contextlib
import copy
import datetime
import decimal
import fractions
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from belief_dist import AdaBelief, ShardedAdaBelief
from belief_dist.options import DEFAULTS

INF, NAN = float("inf"), float("nan")


def nonsense() -> list[Any]:
    """Return what no option, or few, can be; new objects at each call."""
    return [
        *[None, True, False, 0, 1, -1, 2, 2.5, -0.0, NAN, INF, -INF, 1e-50, 1e39, 3e38, 10**400],
        *["", "x", "1e-3", "auto", "cpu", b"x", 1j, [], [1], (0.9,), (0.9, 1.0), (0.9, 0.99, 0.5)],
        *[("a", "b"), (NAN, 0.9), (0.9, None), {}, {"a": 1}, {1, 2}, range(3), object(), len, int],
        *[np.zeros(3), np.float64(NAN), np.float32(0.5), np.int64(2), np.bool_(True)],
        *[fractions.Fraction(1, 3), decimal.Decimal("0.1"), datetime.timedelta(-1)],
        *[torch.float16, torch.tensor(True), torch.tensor(0.5), torch.tensor(NAN), torch.ones(2)],
        *[torch.ones(3, dtype=torch.int64), torch.tensor(1j), torch.ones((), device="meta")],
        *[torch.ones(3).to_sparse(), torch.ones(3), nn.Parameter(torch.ones(3)), torch.ones(0)],
    ]


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
        {"dtype": torch.bfloat16, "master": "remainder", "state_dtype": "uint8"},
    ),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the paths to everything inside of dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def of_tensor(value: torch.Tensor, draw: random.Random) -> Any:
    """Return another tensor than `value`, in one of many ways."""
    changed = value.clone()
    if changed.numel():
        flat = changed.view(-1)
        flat[draw.randrange(len(flat))] = draw.choice(
            [-1, NAN, INF, -INF, 1e38] if value.is_floating_point() else [0, 255]
        )
    dtypes = [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.complex64,
    ]
    return draw.choice(
        [
            *[changed] * 3,
            *[value[:-1] if value.dim() else value, value[None], value.to("meta"), value.tolist()],
            *map(value.to, dtypes),
            value.float().numpy(),
        ]
    )


def mutate(saved: Any, draw: random.Random) -> Any:
    """Change a state_dict at one place."""
    path = draw.choice([(), *places(saved)])
    if not path:
        return draw.choice(nonsense())
    inside = saved
    for key in path[:-1]:
        inside = inside[key]
    last, how = path[-1], draw.choice(["replace", "replace", "tensor", "remove", "add", "rename"])
    if how == "tensor" and isinstance(inside[last], torch.Tensor):
        inside[last] = of_tensor(inside[last], draw)
    elif how == "remove":
        del inside[last]
    elif how == "add" and isinstance(inside, dict):
        inside[draw.choice(["more", 7, -1, None, ("a",), "fused", "step", "capturable"])] = (
            draw.choice(nonsense())
        )
    elif how == "add":
        inside.append(draw.choice([inside[last], *nonsense()]))
    elif how == "rename" and isinstance(inside, dict):
        inside[draw.choice([f"{last}x", 0, 1, 2])] = inside.pop(last)
    else:
        inside[last] = draw.choice(nonsense())
    return saved


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
