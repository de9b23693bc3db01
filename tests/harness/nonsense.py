"""Values that make no sense, and state_dicts with something of them inside; from a seed."""

from __future__ import annotations

import datetime
import decimal
import fractions
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

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
