"""The `params` argument: from whatever a user passes to checked param groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from belief_dist.options import normalize_group_names, shown, validate_options

# Which parameters get no weight decay: those of fewer than 2 dimensions, or those for which a
# function of name (None where parameters came without) and parameter says so.
NoDecay = Literal["1d"] | Callable[[str | None, Tensor], bool] | None

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_UNORDERED = "{where} got a set of parameters, whose order differs between processes; pass a list."


def as_groups(params: Any, where: str) -> list[dict[str, Any]]:
    """Turn parameters, (name, parameter) pairs, groups, or an iterator of them into groups.

    Raises:
        TypeError: `params` is one tensor, a module, or not iterable.
        ValueError: There is nothing in it.
    """
    if isinstance(params, Tensor):
        raise TypeError(f"{where} needs an iterable of parameters, got one tensor; pass [tensor].")
    if isinstance(params, torch.nn.Module):
        raise TypeError(f"{where} needs parameters, got a module; pass model.parameters().")
    if not isinstance(params, Iterable):
        raise TypeError(
            f"{where} needs an iterable of parameters, (name, parameter) pairs or param groups, "
            f"got {type(params).__name__}."
        )
    if isinstance(params, (set, frozenset)):
        raise TypeError(_UNORDERED.format(where=where))
    items = list(params)
    if not items:
        raise ValueError(
            f"{where} got no parameters; was the iterator already used up, "
            f"or is every parameter filtered out?"
        )
    if isinstance(items[0], Mapping):
        for group in items:
            _check_group(group, where)
        return [dict(group) for group in items]
    return [{"params": items}]


def _check_group(group: Any, where: str) -> None:
    if not isinstance(group, Mapping):
        raise TypeError(f"{where} needs each param group to be a dict, got {type(group).__name__}.")


def prepare_group(
    group: Mapping[str, Any], defaults: Mapping[str, Any], owned: set[int], where: str
) -> dict[str, Any]:
    """Return one checked param group, complete with defaults and with a list of parameters.

    Args:
        group: As the user wrote it, with the key "params".
        defaults: Options for those that the group leaves out.
        owned: `id` of each parameter that an earlier group holds.
        where: Named in errors.

    Raises:
        TypeError: Something in it is not a tensor, or an option is unknown or of a wrong type.
        ValueError: A parameter is a duplicate, sparse, not a leaf, or of an unsupported dtype, or
            an option is out of range.
    """
    _check_group(group, where)
    if "params" not in group:
        keys = sorted(map(str, group))
        raise ValueError(f"{where} got a param group without 'params'; it has {shown(keys)}.")
    members = group["params"]
    if isinstance(members, (set, frozenset)):
        raise TypeError(_UNORDERED.format(where=where))
    if not isinstance(members, Iterable):
        raise TypeError(
            f"{where} needs the 'params' of a group to be a tensor or an iterable of them, "
            f"got {shown(members)}."
        )
    members = [members] if isinstance(members, Tensor) else list(members)
    names: list[str] = []
    tensors: list[Tensor] = []
    for member in members:
        if isinstance(member, tuple) and len(member) == 2 and isinstance(member[0], str):
            names.append(member[0])
            member = member[1]
        if not isinstance(member, Tensor):
            raise TypeError(
                f"{where} can only optimize tensors, got {type(member).__name__} at position "
                f"{len(tensors)} of a param group."
            )
        tensors.append(member)
    if names and len(names) != len(tensors):
        raise ValueError(
            f"{where} got a param group in which {len(names)} of {len(tensors)} parameters are "
            f"named; name all of them or none."
        )
    seen = set(owned)
    for position, tensor in enumerate(tensors):
        label = repr(names[position]) if names else f"number {position}"
        if id(tensor) in seen:
            raise ValueError(
                f"{where} got parameter {label} (shape {tuple(tensor.shape)}) twice; "
                f"list every parameter once."
            )
        seen.add(id(tensor))
        if tensor.dtype not in SUPPORTED_DTYPES:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
            raise ValueError(
                f"{where} cannot optimize parameter {label} of dtype "
                f"{str(tensor.dtype).removeprefix('torch.')}; supported: {supported}."
            )
        if tensor.layout != torch.strided:
            raise ValueError(
                f"{where} cannot optimize parameter {label} of layout {tensor.layout}; make it "
                f"dense."
            )
        if not (tensor.is_leaf or tensor.retains_grad):
            raise ValueError(
                f"{where} cannot optimize parameter {label}: it is not a leaf, but the result of "
                f"an operation. Pass the parameter that it was computed from."
            )
    prepared = {**defaults, **normalize_group_names(group, where)}
    prepared["params"] = list(zip(names, tensors, strict=True)) if names else tensors
    validate_options(prepared)
    return prepared


def common_device(params: Sequence[Tensor], where: str) -> torch.device:
    """Return the device on which all parameters lie.

    Raises:
        ValueError: There are none, or they lie on several devices, or on the meta device.
    """
    devices = {param.device for param in params}
    if not devices:
        raise ValueError(f"{where} got no parameters: every param group is empty.")
    if len(devices) > 1:
        raise ValueError(
            f"{where} needs all parameters on one device, got "
            f"{', '.join(sorted(map(str, devices)))}; move the model before building it."
        )
    device = devices.pop()
    if device.type == "meta":
        raise ValueError(f"{where} needs real parameters, got the meta device.")
    return device


def split_by_decay(group: dict[str, Any], no_decay: NoDecay, where: str) -> list[dict[str, Any]]:
    """Return a prepared group as one or two: what decays, and what does not.

    Both keep all other options, names and the order of their parameters; an empty one is left out.

    Raises:
        TypeError: The function `no_decay` does not return a bool.
        ValueError: The function `no_decay` fails.
    """
    if no_decay is None:
        return [group]
    decaying: list[Any] = []
    others: list[Any] = []
    for member in group["params"]:
        name, tensor = member if isinstance(member, tuple) else (None, member)
        (others if _is_exempt(name, tensor, no_decay, where) else decaying).append(member)
    halves = [{**group, "params": decaying}, {**group, "params": others, "weight_decay": 0.0}]
    return [half for half in halves if half["params"]] or [group]


def _is_exempt(name: str | None, tensor: Tensor, no_decay: NoDecay, where: str) -> bool:
    # Under deepspeed.zero.Init a parameter is empty, and its shape is elsewhere.
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
    if not callable(no_decay):
        return len(shape) < 2
    label = f"parameter {name!r} of shape {shape}"
    try:
        exempt = no_decay(name, tensor)
    except Exception as error:
        hint = "" if name else " (without names; pass model.named_parameters() to have them)"
        raise ValueError(f"{where}: no_decay failed on {label}{hint}: {error!r}.") from error
    if not isinstance(exempt, bool):
        raise TypeError(
            f"{where}: no_decay must return True or False, got {shown(exempt)} for {label}."
        )
    return exempt


def refuse_edits(
    param_groups: Sequence[Mapping[str, Any]],
    params: Sequence[Tensor],
    state: Mapping[Tensor, Mapping[str, Any]],
    states: Sequence[Mapping[str, Any]],
) -> None:
    """Refuse groups and states that were edited by hand where they stand for others.

    Args:
        param_groups: As they are now.
        params: The parameters that are trained, in their order.
        state: As it is now.
        states: Those that are trained with, one for each parameter.

    Raises:
        ValueError: A group has other parameters, or a parameter another state.
    """
    listed = [param for group in param_groups for param in group["params"]]
    if len(listed) != len(params) or not all(map(is_, listed, params)):
        raise ValueError(
            "the parameters of a group were edited: ShardedAdaBelief keeps them in buffers of its "
            'own, and would not train what param_groups[i]["params"] has now. Use '
            "add_param_group, or build a new optimizer."
        )
    if len(state) == len(states) and all(map(is_, state.values(), states)):
        return
    if not all(map(is_, map(state.get, params), states)):  # they may be in another order
        raise ValueError(
            "optimizer.state was edited: the states that ShardedAdaBelief trains with are views of "
            "its buffers. Write into the tensors, use load_state_dict, or build a new optimizer to "
            "begin anew."
        )


def refuse_copies(optimizer: Any, protocol: Any) -> NoReturn:
    """Serve as `__reduce_ex__` of an optimizer that can be neither copied nor pickled.

    Raises:
        TypeError: Always.
    """
    raise TypeError(
        f"{type(optimizer).__name__} cannot be copied or pickled: its hooks, buffers and process "
        f"groups belong to this process. Save it by belief_dist.checkpoint.save or state_dict(), "
        f"and build a new one for a copy of the model."
    )
