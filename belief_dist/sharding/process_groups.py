"""From what a user passes as `process_group` to the collectives that serve it.

Every group gets communicators of its own. They keep the order of the optimizer's messages
independent of the collectives that the training script issues in between, and give them a deadline
of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from belief_dist import async_device
from belief_dist.engine_options import EngineOptions
from belief_dist.host_memory import Team, meet
from belief_dist.sharding import symmetric_memory
from belief_dist.sharding.across_hosts import AcrossHosts
from belief_dist.sharding.collectives import (
    AllToAll,
    BackendReduceScatter,
    Collectives,
    SingleRank,
)
from belief_dist.sharding.dtensor import find_mesh
from belief_dist.sharding.hsdp import HybridShard
from belief_dist.sharding.point_to_point import PointToPoint
from belief_dist.sharding.rank_checks import raise_together
from belief_dist.sharding.shared_memory import SharedMemory


def connect(
    ranks: dist.ProcessGroup | DeviceMesh | None,
    options: EngineOptions,
    device: torch.device,
    timeout: timedelta | None,
) -> Collectives:
    """Return the operations for a process group.

    Args:
        ranks: The process group, or a mesh: of one dimension, or of two, of which the last is
            sharded over and the first holds copies. None means all ranks.
        options: Of which `reduction`, `shared_memory`, `shard_over` and `micro_batches` count.
        device: Where the parameters are.
        timeout: After which a missing rank becomes an error; None takes half of that of `ranks`:
            our error, which tells rank, bucket and phase, comes before the backend's.

    Raises:
        TypeError: `ranks` is something else.
        ValueError: This process is not among them, or the mesh has more dimensions.
        RuntimeError: torch.distributed is needed, but not initialized.
    """
    check_ranks(ranks)
    if not (dist.is_available() and dist.is_initialized()):
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks is not None or launched > 1:
            raise RuntimeError(
                f"ShardedAdaBelief needs torch.distributed, which is not initialized although "
                f"WORLD_SIZE is {launched}; call torch.distributed.init_process_group() first."
            )
        return SingleRank()
    rows = rows_of(ranks)
    everyone = list(chain(*rows))
    if dist.get_rank() not in everyone:
        raise ValueError(
            f"rank {dist.get_rank()} is not in process_group, whose ranks are {everyone}."
        )
    group = ranks.get_group(0) if isinstance(ranks, DeviceMesh) else ranks
    backend = str(dist.get_backend(group))
    timeout = timeout or timeout_of(group, device) / 2

    def over(members: Sequence[int], *, may_share: bool = True) -> Collectives:
        if len(members) == 1:
            return SingleRank()
        own = _new_group(members, backend, timeout)
        shares = may_share and options.reduction == "ordered"
        if async_device.runs_behind(device):
            wanted = shares and options.shared_memory == "cuda"
            gpus = symmetric_memory.connect(own, device, timeout, wanted=wanted)
            if gpus is not None:
                return gpus
        team = _meet(own, shares and bool(options.shared_memory) and device.type == "cpu")
        is_gloo = "gloo" in backend and device.type == "cpu"
        if team is not None and len(set(team.hosts)) == 1:
            return SharedMemory(own, team, timeout)
        if team is not None and is_gloo:
            return AcrossHosts(own, team, timeout)
        if options.reduction == "native":
            return BackendReduceScatter(own)
        if is_gloo:
            return PointToPoint(own)
        return AllToAll(own)

    with _in_equally_many_groups(_groups_of(ranks)):
        if len(rows) == 1:
            return over(everyone)
        mine = next(row for row in rows if dist.get_rank() in row)
        column = [row[mine.index(dist.get_rank())] for row in rows]
        # Between rows, sums are started while others are waited for, and need messages.
        return HybridShard(
            _new_group(everyone, backend, timeout),
            over(mine),
            over(column, may_share=False),
            None if options.micro_batches is None else over(everyone),
            keeps_copies=options.shard_over == "row",
        )


def check_ranks(ranks: Any) -> None:
    """Check what was passed as a process group.

    Raises:
        TypeError: It is none, no mesh and not None.
        ValueError: It is that of other ranks.
    """
    if ranks is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process_group that it passes, which "
            f"torch.distributed.new_group has made for others; each rank passes one that it is in."
        )
    if not (ranks is None or isinstance(ranks, (dist.ProcessGroup, DeviceMesh))):
        raise TypeError(
            f"process_group must be a ProcessGroup, a DeviceMesh or None, got a "
            f"{type(ranks).__name__}; "
            f"torch.distributed.new_group(ranks) makes one."
        )


def _meet(group: dist.ProcessGroup, may_share: bool) -> Team | None:
    """Find the ranks of this host; called by all ranks, of which one may have other options."""

    def exchange(value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
        return values

    return meet(dist.get_rank(group), exchange, may_share=may_share)


def check_mesh(ranks: Any, options: EngineOptions) -> None:
    """Check that there is a mesh where an option speaks of one.

    Raises:
        ValueError: There is none of two dimensions.
    """
    is_mesh = isinstance(ranks, DeviceMesh) and ranks.ndim == 2
    if options.shard_over == "mesh" and not is_mesh:
        raise ValueError(
            "shard_over='mesh' needs a process_group that is a mesh of two dimensions, such as "
            "init_device_mesh('cuda', (nodes, gpus)); otherwise leave it out."
        )


class ModelParallel(NamedTuple):
    """The ranks that hold other parts of a model: tensor-parallel parts, or stages of a pipeline.

    Attributes:
        mesh: Over which parameters are cut; None if none is.
        comm: The ranks, one for each part.
        have_same_groups: Every part has the same param groups, with other shapes.
    """

    mesh: DeviceMesh | None
    comm: Collectives
    have_same_groups: bool = True


def timeout_of(group: dist.ProcessGroup | None, device: torch.device) -> timedelta:
    """Return after how long a process group, None being all ranks, gives up on a rank.

    Backends that do not tell, such as those written in Python, get torch's default for NCCL.
    """
    everyone = group or dist.group.WORLD
    assert everyone is not None
    try:
        backend = everyone._get_backend(device)
        found = getattr(getattr(backend, "options", backend), "_timeout", None)
    except RuntimeError:
        found = None
    return found if isinstance(found, timedelta) else timedelta(minutes=10)


def connect_model_parallel(
    params: Sequence[Tensor] | None,
    comm: Collectives,
    group: dist.ProcessGroup | DeviceMesh | None,
    device: torch.device,
    timeout: timedelta | None,
    problem: Exception | None,
) -> ModelParallel:
    """Connect all ranks that hold other parts of the model; called by all of them.

    Args:
        params: The parameters that all ranks of `comm` share; None where there is a problem.
        comm: From `connect`.
        group: The ranks that hold other parts; None for those over which parameters are cut.
        device: As for `connect`.
        timeout: After which a missing rank becomes an error.
        problem: What this rank alone has found wrong so far, which is raised now.

    Raises:
        Exception: `problem`.
        ValueError: Parameters lie on different meshes, or are cut over others than `group`, or
            another rank has a problem.
    """
    mesh = None
    if params is not None:
        try:
            check_ranks(group)
            mesh = find_mesh(params, comm.members)
            _check_parts(group, mesh, comm.members)
        except (TypeError, ValueError) as error:
            problem, group = error, None
    found = ModelParallel(mesh, SingleRank())
    parts = group if group is not None else mesh
    members = [] if parts is None else _members(parts)
    if parts is not None and len(members) > 1:
        with _in_equally_many_groups(_groups_of(parts)):
            row = parts.get_group(0) if isinstance(parts, DeviceMesh) else parts
            timeout = timeout or timeout_of(row, device) / 2
            own = _new_group(members, str(dist.get_backend(row)), timeout)
            found = ModelParallel(mesh, BackendReduceScatter(own), group is None)
    raise_together(comm, problem)
    raise_together(found.comm, problem)
    return found


def _check_parts(
    group: dist.ProcessGroup | DeviceMesh | None, mesh: DeviceMesh | None, shared: Sequence[int]
) -> None:
    if group is None:
        return
    members = set(_members(group))
    if dist.get_rank() not in members or len(members & set(shared)) > 1:
        raise ValueError(
            f"model_parallel_group has the ranks {sorted(members)}: it must have rank "
            f"{dist.get_rank()}, and no other of process_group, which are {list(shared)}, as those "
            f"hold the same part of the model."
        )
    cut = set() if mesh is None else set(_members(mesh))
    if not cut <= members:
        raise ValueError(
            f"parameters are cut over the ranks {sorted(cut)}, and model_parallel_group has only "
            f"{sorted(members)}: it must have all parts of the model."
        )


def _members(ranks: dist.ProcessGroup | DeviceMesh) -> list[int]:
    if isinstance(ranks, DeviceMesh):
        found: list[int] = ranks.mesh.flatten().tolist()
        return found
    return dist.get_process_group_ranks(ranks)


def _groups_of(
    ranks: dist.ProcessGroup | DeviceMesh | None,
) -> Sequence[dist.ProcessGroup | None]:
    return ranks.get_all_groups() if isinstance(ranks, DeviceMesh) else [ranks]


@contextmanager
def _in_equally_many_groups(groups: Sequence[dist.ProcessGroup | None]) -> Iterator[None]:
    """Make this rank a member of as many process groups as any other rank of `groups`.

    torch names a group that only its members make after their ranks and the number of groups that a
    member is in already. Where that differs (a script has made a group of some ranks, say) they
    would wait under different names, and for ever.

    Args:
        groups: Which together connect all ranks: a process group, or one for each dimension of a
            mesh.
    """
    own = most = len(dist.distributed_c10d._world.pg_names)
    for group in groups:
        counts = [0] * dist.get_world_size(group)
        dist.all_gather_object(counts, most, group=group)
        most = max(counts)
    alone = [
        dist.new_group([dist.get_rank()], use_local_synchronization=True) for _ in range(most - own)
    ]
    try:
        yield
    finally:
        for group in alone:
            dist.destroy_process_group(group)


def _new_group(members: Sequence[int], backend: str, timeout: timedelta) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(
        list(members), timeout=timeout, backend=backend, use_local_synchronization=True
    )
    return group


def rows_of(ranks: dist.ProcessGroup | DeviceMesh | None) -> list[list[int]]:
    """Return the global ranks that share shards between them; each row holds a copy of all.

    Raises:
        ValueError: The mesh has more than two dimensions.
    """
    if not isinstance(ranks, DeviceMesh):
        return [dist.get_process_group_ranks(ranks or dist.group.WORLD)]
    if ranks.ndim > 2:
        names = ranks.mesh_dim_names
        how = f"mesh[{names[-2:]!r}]" if names else "a slice of it"
        raise ValueError(
            f"process_group must be a mesh of 1 or 2 dimensions, got one of {ranks.ndim} {names}; "
            f"pass those to hold copies and to shard over, for example {how}."
        )
    rows: list[list[int]] = ranks.mesh.view(-1, ranks.mesh.shape[-1]).tolist()
    return rows
