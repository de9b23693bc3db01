"""What the layout must know of parameters, and what errors call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from belief_dist.sharding.dtensor import describe, local_part
from belief_dist.sharding.layout import ParamSpec


def param_specs(
    param_groups: Sequence[Mapping[str, Any]],
    ranks_of_group: Sequence[int],
    known: Sequence[ParamSpec],
) -> list[ParamSpec]:
    """Describe the parameters of all groups, in their order.

    Args:
        param_groups: Of the optimizer.
        ranks_of_group: Of each group, which ranks share it: see `ParamSpec.ranks`.
        known: Descriptions of the first parameters, which are laid out already. They stay, although
            such a parameter may have been unfrozen since.
    """
    specs = list(known)
    count = 0
    for number, group in enumerate(param_groups):
        names = group.get("param_names")
        for position, param in enumerate(group["params"]):
            count += 1
            if count <= len(known):
                continue
            specs.append(
                ParamSpec(
                    name=names[position] if names else str(len(specs)),
                    shape=tuple(local_part(param).shape),
                    dtype=str(param.dtype).removeprefix("torch."),
                    itemsize=param.element_size(),
                    group=number,
                    kind=_kind(group, number, param, ranks_of_group[number], len(known)),
                    ranks=ranks_of_group[number],
                )
            )
    return specs


def _kind(group: Mapping[str, Any], number: int, param: Tensor, ranks: int, num_known: int) -> str:
    """Return what sets a parameter's bucket apart: all in which its parameters must be alike."""
    marks = {
        "frozen": not param.requires_grad,
        "amsgrad": group["amsgrad"],
        "unclipped": not group["clip"],
        f"norm of group {number}": group["max_grad_norm"] is not None,
        f"ranks {ranks}": ranks > 0,
        f"after {num_known}": num_known > 0,  # buckets that exist stay as they are
    }
    return describe(param) + " ".join(mark for mark, holds in marks.items() if holds)


def param_label(param_groups: Sequence[Mapping[str, Any]], index: int) -> str:
    """Return what an error calls parameter number `index`."""
    for group in param_groups:
        if index < len(group["params"]):
            names = group.get("param_names")
            shape = tuple(group["params"][index].shape)
            return f"{names[index]!r}" if names else f"number {index} of shape {shape}"
        index -= len(group["params"])
    raise IndexError(index)
