"""Param groups with ranks of their own: who shares them, checked by all ranks, and connected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from belief_dist.engine_options import EngineOptions
from belief_dist.sharding.collectives import Collectives
from belief_dist.sharding.dtensor import check_own_parts
from belief_dist.sharding.process_groups import check_ranks, connect, rows_of
from belief_dist.sharding.rank_checks import raise_together

# Global ranks: those of a row share shards, and each row holds a copy of all.
_Rows = tuple[tuple[int, ...], ...]


class OwnRanks:
    """The ranks of param groups that not all ranks of the optimizer share.

    Attributes:
        comms: Of each set of ranks.
        of_group: Of each param group, 0 if all ranks share it, else 1 + the position in `comms`.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self.comms: list[Collectives] = []
        self.of_group: list[int] = []
        self._numbers: dict[_Rows, int] = {}

    def connect(
        self,
        wanted: Sequence[dist.ProcessGroup | DeviceMesh | None],
        param_groups: Sequence[Mapping[str, Any]],
        comm: Collectives,
        parts: Collectives,
        options: EngineOptions,
        device: torch.device,
        timeout: timedelta | None,
    ) -> None:
        """Connect what further param groups want; called by all ranks of the optimizer.

        Args:
            wanted: Of every param group, its process group, or None for all ranks.
            param_groups: All of them.
            comm: All ranks.
            parts: The ranks that hold other parts of the model, some of which may be among them.
            options: As for `connect`.
            device: As for `connect`.
            timeout: As for `connect`.

        Raises:
            TypeError: As `connect`.
            ValueError: On all ranks: some rank is not among its own, or sets of ranks overlap or
                differ in size. Nothing has changed then.
        """
        begin = len(self.of_group)
        params = [group["params"] for group in param_groups]
        new = list(zip(wanted[begin:], params[begin:], strict=True))
        mine: list[_Rows | None] = []
        problem: Exception | None = None
        try:
            mine = _rows_of_groups(new, comm.members, options)
        except (TypeError, ValueError) as error:
            problem = error
        try:
            raise_together(comm, problem)
            _check_sets(comm.exchange(mine), comm.members, begin, options, parts.world_size > 1)
        except (TypeError, ValueError) as error:
            problem = error
        raise_together(parts, problem)  # before any of these waits for a set
        for rows, group in zip(mine, wanted[begin:], strict=True):
            if rows is not None and rows not in self._numbers:
                self.comms.append(connect(group, options, device, timeout))
                self._numbers[rows] = len(self.comms)
            self.of_group.append(0 if rows is None else self._numbers[rows])

    def forget(self, first: int) -> None:
        """Forget the param groups from `first` on; their ranks stay connected."""
        del self.of_group[first:]


def _rows_of_groups(
    groups: Sequence[tuple[dist.ProcessGroup | DeviceMesh | None, Sequence[Tensor]]],
    everyone: Sequence[int],
    options: EngineOptions,
) -> list[_Rows | None]:
    """Return the ranks of each param group that has its own; check what this rank alone can."""
    found: list[_Rows | None] = []
    for group, params in groups:
        rows = None if group is None else _own_rows(group)
        if rows is not None:
            check_own_parts(params, set(chain(*rows)), everyone)
        found.append(rows)
    if options.micro_batches is not None and any(found):
        raise ValueError(
            "micro_batches does not go together with param groups that have a process_group of "
            "their own: which samples reach an expert in one backward pass depends on where it "
            "is, and so would the result."
        )
    return found


def _check_sets(
    everyone: Sequence[Sequence[_Rows | None]],
    members: Sequence[int],
    begin: int,
    options: EngineOptions,
    may_reach_out: bool,
) -> None:
    """Check that the ranks' sets fit together; the same on all of them.

    Args:
        everyone: From `_rows_of_groups`, of each rank.
        members: These ranks.
        begin: Number of the first param group.
        options: Of the engine.
        may_reach_out: Sets may have other ranks, too.
    """
    for rank, theirs in enumerate(everyone):
        if [rows is None for rows in theirs] != [rows is None for rows in everyone[0]]:
            raise ValueError(
                f"ranks disagree about which param groups have a process_group of their own: rank "
                f"{rank} and the first one of process_group."
            )
    for number, each in enumerate(zip(*everyone, strict=True), start=begin):
        found = {rows for rows in each if rows is not None}
        if found and not _fit(found, None if may_reach_out else members):
            raise ValueError(
                f"the ranks {members} pass sets {sorted(found)} as the process_group of param "
                f"group {number}: these must be equally large, and have each of the ranks once, as "
                f"mesh['expert_dp'] does of a mesh ('expert_dp', 'expert')."
            )
        reaches_out = any(not set(chain(*rows)) <= set(members) for rows in found)
        if reaches_out and (options.overlap or options.stage == 2):
            raise ValueError(
                f"process_group of param group {number} has ranks of other stages, whose backward "
                f"passes wait for this one's: with such a group, pass overlap=False and stage=1, "
                f"which sum gradients in step()."
            )


def _fit(found: Collection[Any], everyone: Sequence[int] | None) -> bool:
    """Return whether sets of ranks are equally large and disjoint, and are `everyone` together."""
    ranks = [rank for rows in found for rank in chain(*rows)]
    shapes = {(len(rows), len(rows[0])) for rows in found}
    is_whole = everyone is None or sorted(ranks) == sorted(everyone)
    return len(shapes) == 1 and len(ranks) == len(set(ranks)) and is_whole


def _own_rows(ranks: Any) -> _Rows:
    check_ranks(ranks)
    rows = tuple(map(tuple, rows_of(ranks)))
    if dist.get_rank() not in chain(*rows):
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process_group of a param group, which is "
            f"{list(map(list, rows))}; each rank passes one that it is in."
        )
    return rows
