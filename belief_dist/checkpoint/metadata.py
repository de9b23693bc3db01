"""The metadata entry of a checkpoint: options, step counts and dtypes, as plain values.

Everything is keyed by parameter name, so that the optimizer that reads it may have its parameters
in another order and in other groups.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from belief_dist.checkpoint.names import dtype_name
from belief_dist.checkpoint.plain_values import to_plain
from belief_dist.options import OPTION_NAMES
from belief_dist.sharded import ShardedAdaBelief

# Version of the checkpoint format. A test loads a checkpoint of every version so far.
FORMAT = 1
# Names of the parameters whose float32 masters are numbers of 24 bits.
SHORT_MASTERS = "masters_of_24_bits"
_NOT_OPTIONS = {"params", "param_names"}


def make_metadata(
    optimizer: Optimizer | None, names: Sequence[str], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """Return the metadata, which consists of numbers, strings, lists and dicts only.

    Args:
        optimizer: The optimizer; None if the checkpoint holds weights only.
        names: Names of its parameters.
        aliases: Further names of tied weights, each with the name under which the weight is saved.
    """
    found: dict[str, Any] = {"format": FORMAT, "aliases": dict(aliases), "names": list(names)}
    if optimizer is None:
        return found
    remaining = iter(names)
    groups: list[dict[str, Any]] = []
    steps: dict[str, int] = {}
    dtypes: dict[str, str] = {}
    short: list[str] = []
    for group in optimizer.param_groups:
        members = [next(remaining) for _ in group["params"]]
        options = {
            key: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            for key, value in group.items()
            if key not in _NOT_OPTIONS
        }
        options = to_plain(options, f"param group {len(groups)}")
        groups.append({"params": members, "options": options})
        for name, param in zip(members, group["params"], strict=True):
            dtypes[name] = dtype_name(param)
            state = optimizer.state.get(param)
            if state:
                steps[name] = int(state["step"])
                rest = state.get("remainder")
                if rest is not None and rest.dtype == torch.int8:
                    short.append(name)
    found |= {"groups": groups, "steps": steps, "dtypes": dtypes}
    if isinstance(optimizer, ShardedAdaBelief):
        found |= {
            "ranks": optimizer.comm.world_size,
            "seed": optimizer.options.seed,
            "micro_batches": optimizer.options.micro_batches,
            "skipped_steps": optimizer.skipped_steps,
            "spike_history": optimizer.spike_history,
            SHORT_MASTERS: short,
        }
    return found


def merge_metadata(everyone: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one metadata of ranks that hold other parameters, each its own: experts, or stages.

    Args:
        everyone: From `make_metadata` on each rank, with more that is keyed by names.
    """
    found: dict[str, Any] = copy.deepcopy(dict(everyone[0]))
    for theirs in everyone[1:]:
        for key, value in theirs.items():
            if isinstance(value, dict) and isinstance(found.get(key), dict):
                found[key] = {**value, **found[key]}
            elif isinstance(value, list) and key != "groups":
                found[key] = list(dict.fromkeys([*found[key], *value]))
        placed = {name for group in found.get("groups", ()) for name in group["params"]}
        for number, group in enumerate(theirs.get("groups", ())):
            names = [name for name in group["params"] if name not in placed]
            like = found["groups"][number] if number < len(found["groups"]) else None
            if like is not None and like["options"] == group["options"]:
                like["params"] += names
            elif names:
                found["groups"].append({**group, "params": names})
    return found


def other_micro_batches(optimizer: Optimizer, metadata: Mapping[str, Any]) -> list[str]:
    """Return a sentence if a step of `optimizer` has another number of micro-batches than saved."""
    if not isinstance(optimizer, ShardedAdaBelief) or "micro_batches" not in metadata:
        return []  # it was saved by another optimizer, or before there was the option
    saved, own = metadata["micro_batches"], optimizer.options.micro_batches
    if saved == own:
        return []
    return [
        f"steps had micro_batches={saved} and have {own} from here on, with other bits than those "
        f"of the run that saved it"
    ]


def check_format(metadata: Any) -> None:
    """Check that this version of belief_dist can read the checkpoint.

    Raises:
        ValueError: There is no format version, or a later one.
    """
    version = metadata.get("format") if isinstance(metadata, Mapping) else None
    if version is None:
        raise ValueError("this is no checkpoint of belief_dist: it has no description.")
    if version > FORMAT:
        raise ValueError(
            f"its format is {version}, and this version of belief_dist reads formats up to "
            f"{FORMAT}; update belief_dist."
        )


def match_groups(
    optimizer: Optimizer, names: Sequence[str], metadata: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the saved options for each of the optimizer's groups.

    Raises:
        ValueError: The parameters of a group were saved with different options.
    """
    saved: dict[str, dict[str, Any]] = {}  # options by parameter name
    for group in metadata["groups"]:
        saved |= dict.fromkeys(group["params"], group["options"])
    remaining = iter(names)
    found: list[dict[str, Any]] = []
    for number, group in enumerate(optimizer.param_groups):
        members = [next(remaining) for _ in group["params"]]
        if not members:  # an empty group keeps its own options
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
    """Set the saved options of every group; an lr that is a tensor is filled in place.

    A limit of the group's own norm stays, as that of the model's does.
    """
    for group, saved in zip(optimizer.param_groups, options, strict=True):
        for key, value in saved.items():
            if key == "max_grad_norm":
                continue
            own = group.get(key)
            if isinstance(own, Tensor):  # a captured CUDA graph reads the lr from this tensor
                own.fill_(value)
            elif isinstance(own, tuple):
                group[key] = tuple(value)
            else:
                group[key] = copy.deepcopy(value)
