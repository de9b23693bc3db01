"""In which norm the gradients of a param group count, and by what they are multiplied.

Most count in the norm of the whole model. Those of a group with ``"clip": False`` count in none,
and those of a group with a ``"max_grad_norm"`` in a norm of their own, by which they alone are
clipped. A step's message has the squares of each norm, that of the model first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from belief_dist import kernels
from belief_dist.norm import NUM_WORDS
from belief_dist.options import positive_or_none

UNCLIPPED = -1  # no norm
MODEL = 0  # any larger number is the norm of a param group, the one before it


class GradScales(NamedTuple):
    """What follows from the squares of a step.

    Attributes:
        norms: The L2 norm of the mean gradient, unclipped, by the number of the norm: one element,
            float64.
        factors: By what summed gradients are multiplied, likewise; that of `UNCLIPPED` makes them
            the mean.
    """

    norms: dict[int, Tensor]
    factors: dict[int, Tensor]


NO_SCALES = GradScales({}, {})


def norm_of(number: int, group: Mapping[str, Any]) -> int:
    """Return the number of the norm in which the gradients of param group `number` count."""
    if not group["clip"]:
        return UNCLIPPED
    return MODEL if group["max_grad_norm"] is None else number + 1


def norms_of(param_groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the same of all param groups."""
    return [norm_of(number, group) for number, group in enumerate(param_groups)]


def check_norms(param_groups: Sequence[Mapping[str, Any]], made: Sequence[int]) -> None:
    """Refuse norms for which buckets were not cut; all ranks have the same options.

    Args:
        param_groups: As they are now.
        made: From `norms_of`, when buckets were cut.

    Raises:
        ValueError: A group has got a norm of its own since, or has lost it.
    """
    for number, before in enumerate(made):
        group = param_groups[number]
        if (before > MODEL) != (group["max_grad_norm"] is not None):
            raise ValueError(
                f"max_grad_norm of param group {number} was set to {group['max_grad_norm']} after "
                f"ShardedAdaBelief was built; buckets are cut by then. Build a new one."
            )


def grad_scales(
    bins: Tensor,
    param_groups: Sequence[Mapping[str, Any]],
    made: Sequence[int],
    *,
    world_size: int,
    loss_scale: Tensor | None,
    limit: float | None,
) -> GradScales:
    """Return the norms, and the factors on summed gradients.

    Args:
        bins: (number of norms * norm.NUM_WORDS,), int64: the squares of all ranks.
        param_groups: With the limits of their own norms.
        made: See `check_norms`.
        world_size: See `kernels.grad_scales`.
        loss_scale: Likewise.
        limit: Of the model's norm, or None.

    Raises:
        ValueError: A limit is not positive.
    """
    found = GradScales({}, {})
    own = [norm for norm in made if norm > MODEL]
    for norm, words in zip([MODEL, *own], bins.split(NUM_WORDS), strict=True):
        if norm > MODEL:
            limit = positive_or_none("max_grad_norm", param_groups[norm - 1]["max_grad_norm"])
        scales = kernels.grad_scales(
            words, world_size=world_size, loss_scale=loss_scale, limit=limit
        )
        found.norms[norm], found.factors[norm], mean = scales.unbind()
        found.factors.setdefault(UNCLIPPED, mean)
    return found
