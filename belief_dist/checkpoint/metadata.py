"""What a checkpoint says of an optimizer besides tensors: plain values, and how they fit another.

The entry is written by DCP like any other. All of it is by name, so that neither the order of
parameters nor the number and order of groups matters where it is read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from belief_dist.checkpoint.names import dtype_name
from belief_dist.options import OPTION_NAMES
from belief_dist.sharded import ShardedAdaBelief

FORMAT = 1  # of checkpoints; a test loads one of every format that there ever was
_NOT_OPTIONS = {"params", "param_names"}


def describe(
    optimizer: Optimizer | None, names: Sequence[str], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """Return the description: of numbers, strings, lists and dicts alone.

    Args:
        optimizer: None describes weights alone.
        names: Of its parameters.
        aliases: Other names of tied weights, with the name under which the weight is held.
    """
    found: dict[str, Any] = {"format": FORMAT, "aliases": dict(aliases), "names": list(names)}
    if optimizer is None:
        return found
    remaining = iter(names)
    groups, steps, dtypes = [], {}, {}
    for group in optimizer.param_groups:
        members = [next(remaining) for _ in group["params"]]
        options = {k: _plain(v) for k, v in group.items() if k not in _NOT_OPTIONS}
        groups.append({"params": members, "options": options})
        for name, param in zip(members, group["params"], strict=True):
            dtypes[name] = dtype_name(param)
            state = optimizer.state.get(param)
            if state:
                steps[name] = int(state["step"])
    found |= {"groups": groups, "steps": steps, "dtypes": dtypes}
    if isinstance(optimizer, ShardedAdaBelief):
        found |= {
            "ranks": optimizer.comm.world_size,
            "seed": optimizer.options.seed,
            "skipped_steps": optimizer.skipped_steps,
        }
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return copy.deepcopy(value)


def check_format(description: Any) -> None:
    """Refuse what this version cannot read.

    Raises:
        ValueError: It is no description, or of a later format.
    """
    version = description.get("format") if isinstance(description, Mapping) else None
    if version is None:
        raise ValueError("this is no checkpoint of belief_dist: it has no description.")
    if version > FORMAT:
        raise ValueError(
            f"its format is {version}, and this version of belief_dist reads formats up to "
            f"{FORMAT}; update belief_dist."
        )


def match_groups(
    optimizer: Optimizer, names: Sequence[str], description: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the saved options for each of the optimizer's groups.

    Raises:
        ValueError: Parameters of one group had different options when they were saved.
    """
    saved: dict[str, dict[str, Any]] = {}
    for group in description["groups"]:
        saved |= dict.fromkeys(group["params"], group["options"])
    remaining = iter(names)
    found: list[dict[str, Any]] = []
    for number, group in enumerate(optimizer.param_groups):
        members = [next(remaining) for _ in group["params"]]
        if not members:
            found.append({})
            continue
        first = saved[members[0]]
        for name in members[1:]:
            for option in OPTION_NAMES:
                if saved[name].get(option) != first.get(option):
                    raise ValueError(
                        f"parameters {members[0]!r} and {name!r} are both in param group {number}, "
                        f"but were saved with {option}={first.get(option)!r} and "
                        f"{saved[name].get(option)!r}; group them as they were."
                    )
        if first.get("amsgrad") != group["amsgrad"]:
            raise ValueError(
                f"parameter {members[0]!r} was saved with amsgrad={first.get('amsgrad')}, and "
                f"param group {number} has amsgrad={group['amsgrad']}; build it alike."
            )
        found.append(first)
    return found


def apply_options(optimizer: Optimizer, options: Sequence[Mapping[str, Any]]) -> None:
    """Give every group its saved options; an lr that is a tensor stays the same tensor."""
    for group, saved in zip(optimizer.param_groups, options, strict=True):
        for key, value in saved.items():
            own = group.get(key)
            if isinstance(own, Tensor):
                own.fill_(value)
            elif isinstance(own, tuple):
                group[key] = tuple(value)
            else:
                group[key] = copy.deepcopy(value)


def check_plain(extra: Mapping[str, Any]) -> None:
    """Refuse what could not be read again without running code from the checkpoint.

    Raises:
        ValueError: A value is of another kind.
    """
    for key, value in extra.items():
        if not isinstance(key, str):
            raise ValueError(f"the keys of extra must be strings, got {key!r}.")
        odd = _odd(value)
        if odd is not None:
            raise ValueError(
                f"extra[{key!r}] holds a {type(odd).__name__}; a checkpoint takes None, numbers, "
                f"strings, bytes, tensors, and lists, tuples and dicts of them."
            )


def _odd(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return next((odd for item in value if (odd := _odd(item)) is not None), None)
    plain = (int, float, complex, str, bytes, Tensor, torch.dtype, torch.Size)
    return None if value is None or isinstance(value, plain) else value
