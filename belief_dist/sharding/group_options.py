"""The options of all param groups, in a form that ranks compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor

from belief_dist import async_device
from belief_dist.options import OPTION_NAMES, shown

ParamGroups = Sequence[Mapping[str, Any]]
_KEYS = (*OPTION_NAMES, "clip")
_get = itemgetter(*_KEYS)
_NUMBERS = (float, bool)  # as they are; asked first, for hundreds of groups


def options_of(param_groups: ParamGroups) -> list[dict[str, Any]]:
    """Return the options of all groups as numbers that `repr` tells apart to the last bit."""
    return [
        {
            key: v if type(v) in _NUMBERS else _plain(v)
            for key, v in zip(_KEYS, _get(group), strict=True)
        }
        for group in param_groups
    ]


def take_own(param_group: Any) -> tuple[Any, bool, Any]:
    """Return a param group without what this optimizer alone knows: "clip" and "process_group".

    Raises:
        TypeError: clip is neither True nor False.
    """
    clip, ranks = True, None
    if isinstance(param_group, Mapping):
        param_group = dict(param_group)
        clip = param_group.pop("clip", True)
        ranks = param_group.pop("process_group", None)
    if not isinstance(clip, bool):
        raise TypeError(f"clip of a param group must be True or False, got {shown(clip)}.")
    return param_group, clip, ranks


def known_options_of(param_groups: ParamGroups) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Return the same without a visit to a device, and the learning rates that are on one."""
    late = [group["lr"] for group in param_groups if _is_late(group["lr"])]
    if not late:
        return options_of(param_groups), []
    hidden = [{**g, "lr": 0.0} if _is_late(g["lr"]) else g for g in param_groups]
    return options_of(hidden), late


def _is_late(value: Any) -> bool:
    return isinstance(value, Tensor) and async_device.runs_behind(value.device)


def _plain(value: Any) -> Any:
    # A tensor prints four digits, and its device; a list from JSON is the same pair as a tuple.
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value if isinstance(value, bool) else float(value)


def check_amsgrad(param_groups: ParamGroups, made: Iterable[tuple[Iterable[int], bool]]) -> None:
    """Refuse a switch that states were not made for; all ranks have the same options.

    Args:
        param_groups: As they are now.
        made: Of each bucket its groups, and whether there is a largest s.

    Raises:
        ValueError: It was switched.
    """
    for groups, has_largest in made:
        for number in groups:
            wanted = param_groups[number]["amsgrad"]
            if wanted != has_largest:
                raise ValueError(
                    f"amsgrad of param group {number} was set to {wanted} after ShardedAdaBelief "
                    f"was built; its states are laid out by then. Build a new one."
                )
