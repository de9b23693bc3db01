"""Parameters that are cut over the ranks of a tensor-parallel mesh: DTensors.

The optimizer works on this rank's local part as if it were the whole parameter; data-parallel peers
hold the same part. Only the global norm must know more: what several ranks of the mesh hold counts
on one of them.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Tell whether a tensor is a DTensor, without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank stores of a parameter; the parameter itself if it is no DTensor."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """Return this rank's part of a gradient, cut like its parameter; collective if it is not."""
    if not is_dtensor(param):
        return grad
    assert is_dtensor(grad)
    local: Tensor = grad.redistribute(placements=param.placements).to_local()
    wait = getattr(local, "wait", None)  # of a collective that is under way
    return wait() if wait is not None else local


def like_param(local: Tensor, param: Tensor) -> Tensor:
    """Return `local` as a tensor of the kind of `param`, which shares its memory."""
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor

    whole: Tensor = DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    return whole


def find_mesh(params: Sequence[Tensor], group: Collection[int]) -> DeviceMesh | None:
    """Return the mesh over which parameters are cut, or None if none is.

    Args:
        params: All parameters.
        group: The global ranks over which the optimizer shards.

    Raises:
        ValueError: Parameters lie on several meshes, are partial sums, or are cut over ranks that
            the optimizer shards over too.
    """
    found: DeviceMesh | None = None
    for param in params:
        if not is_dtensor(param):
            continue
        mesh = param.device_mesh
        if found is not None and mesh != found:
            raise ValueError(
                f"all DTensor parameters must lie on one mesh, got {found} and {mesh}."
            )
        found = mesh
        if any(placement.is_partial() for placement in param.placements):
            raise ValueError(
                f"a DTensor parameter must be sharded or replicated, got {param.placements}."
            )
    if found is not None:
        shared = sorted(set(found.mesh.flatten().tolist()) & set(group))
        if len(shared) > 1:
            raise ValueError(
                f"DTensor parameters are cut over ranks {shared}, over which ShardedAdaBelief "
                f"would shard too. With tensor parallelism, pass the data-parallel part of the "
                f"mesh, for example process_group=mesh['dp']; with FSDP2 use AdaBelief."
            )
    return found


def check_own_parts(
    params: Sequence[Tensor], own: Collection[int], everyone: Collection[int]
) -> None:
    """Check how parameters are cut that not all ranks share, such as experts.

    Args:
        params: Those of one param group.
        own: The ranks that share them.
        everyone: All ranks of the optimizer.

    Raises:
        ValueError: Several ranks of their mesh share them, or hold the same part, or are no ranks
            of the optimizer.
    """
    for param in params:
        if not is_dtensor(param):
            continue
        mesh = set(param.device_mesh.mesh.flatten().tolist())
        is_cut = all(placement.is_shard() for placement in param.placements)
        if not is_cut or len(mesh & set(own)) > 1 or not mesh <= set(everyone):
            raise ValueError(
                f"a DTensor parameter of a param group with a process_group of its own has the "
                f"placements {param.placements} on the ranks {sorted(mesh)}: it must be cut over "
                f"ranks of the optimizer's process_group, {sorted(everyone)}, of which the group's "
                f"own, {sorted(own)}, hold the same part."
            )


def stands_for_part(param: Tensor, mesh: DeviceMesh | None) -> bool:
    """Tell whether this rank counts its part of `param` in the global norm, and no other does."""
    if mesh is None:
        return True
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    placements: Sequence[Any] = param.placements if is_dtensor(param) else [None] * mesh.ndim
    return all(
        position == 0 or (placement is not None and placement.is_shard())
        for position, placement in zip(coordinate, placements, strict=True)
    )


def coordinate_of(mesh: DeviceMesh | None) -> tuple[int, ...]:
    """Return which part of the model this rank holds."""
    coordinate = None if mesh is None else mesh.get_coordinate()
    return tuple(coordinate or ())


def describe(param: Tensor) -> str:
    """Return how a parameter is cut; parameters that are not cut alike have other descriptions."""
    return str(param.placements) if is_dtensor(param) else ""
