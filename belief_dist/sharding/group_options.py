"""The options of all param groups, in a form that ranks compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor

from belief_dist import async_device
from belief_dist.options import CLIPPING_NAMES, OPTION_NAMES, positive_or_none, shown

ParamGroups = Sequence[Mapping[str, Any]]
_KEYS = (*OPTION_NAMES, *CLIPPING_NAMES)
_get = itemgetter(*_KEYS)
_NUMBERS = (float, bool, type(None))  # as they are; asked first, for hundreds of groups


def options_of(param_groups: ParamGroups) -> list[dict[str, Any]]:
    """Return the options of all groups as numbers that `repr` tells apart to the last bit."""
    return [
        {
            key: v if type(v) in _NUMBERS else _plain(v)
            for key, v in zip(_KEYS, _get(group), strict=True)
        }
        for group in param_groups
    ]


def take_own(param_group: Any) -> tuple[Any, dict[str, Any], Any]:
    """Return a param group without what this optimizer alone knows, and that.

    Returns:
        The group; how it is clipped, "clip" and "max_grad_norm"; and its "process_group".

    Raises:
        TypeError: clip is neither True nor False, or max_grad_norm no number.
        ValueError: max_grad_norm is not positive, or there is nothing to be clipped to it.
    """
    clip, limit, ranks = True, None, None
    if isinstance(param_group, Mapping):
        param_group = dict(param_group)
        clip = param_group.pop("clip", True)
        limit = positive_or_none(
            "max_grad_norm of a param group", param_group.pop("max_grad_norm", None)
        )
        ranks = param_group.pop("process_group", None)
    if not isinstance(clip, bool):
        raise TypeError(f"clip of a param group must be True or False, got {shown(clip)}.")
    if limit is not None and not clip:
        raise ValueError(
            f"a param group has max_grad_norm={limit}, to which its own norm is clipped, and "
            f"clip=False, which clips nothing; leave one of them out."
        )
    return param_group, {"clip": clip, "max_grad_norm": limit}, ranks


def check_split(groups: Sequence[Any], clipping: Mapping[str, Any]) -> None:
    """Refuse a norm of a param group that `no_decay` splits.

    Raises:
        ValueError: It would be two norms.
    """
    limit = clipping["max_grad_norm"]
    if len(groups) > 1 and limit is not None:
        raise ValueError(
            f"no_decay splits a param group whose own norm is clipped to max_grad_norm={limit} "
            f"into {len(groups)}, which would be clipped one by one; leave no_decay out and give "
            f"two groups, each with the limit and the weight_decay that it shall have."
        )


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
