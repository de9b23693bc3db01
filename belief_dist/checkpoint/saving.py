"""Save: what there is to write, and writing it so that it is there as a whole or not at all."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_saver as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from belief_dist.checkpoint import run_directory as folders
from belief_dist.checkpoint.checksummed_files import SummingWriter, write_manifest
from belief_dist.checkpoint.entries import DESCRIPTION, EXTRA, entries_of, weight_key
from belief_dist.checkpoint.errors import CheckpointError, of_dcp, together
from belief_dist.checkpoint.local_shards import holdings
from belief_dist.checkpoint.metadata import check_plain, describe
from belief_dist.checkpoint.names import model_tensors, parameter_names
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.collectives import BackendReduceScatter, Collectives, SingleRank


@dataclass(frozen=True)
class Saved:
    """What became of a save.

    Attributes:
        path: The checkpoint.
        step: Its step.
        blocked: Seconds for which the caller waited.
        seconds: Seconds from the call until it was complete.
        nbytes: Written by this rank.
    """

    path: Path
    step: int
    blocked: float
    seconds: float
    nbytes: int


def team_of(optimizer: Optimizer | None, group: dist.ProcessGroup | None) -> Collectives:
    """Return the ranks that save or load together.

    Args:
        optimizer: Whose ranks they are, if it is a `ShardedAdaBelief` and `group` is None.
        group: These ranks; None without such an optimizer means all.
    """
    if (
        group is None
        and isinstance(optimizer, ShardedAdaBelief)
        and not optimizer.is_model_parallel
    ):
        return optimizer.comm
    if not (dist.is_available() and dist.is_initialized()):
        return SingleRank()
    if dist.get_world_size(group) == 1:
        return SingleRank()
    return BackendReduceScatter(group if group is not None else dist.group.WORLD)


def settle(optimizer: Optimizer | None) -> None:
    """Wait for what the optimizer has under way."""
    if isinstance(optimizer, ShardedAdaBelief):
        optimizer.wait_pending()


@torch.no_grad()
def contents(
    model: torch.nn.Module | None,
    optimizer: Optimizer | None,
    scaler: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that this rank writes, as a state_dict for `torch.distributed.checkpoint`.

    What travels is settled first. Tensors share the live memory.

    Args:
        model: Its weights and buffers; None for the optimizer's parameters alone.
        optimizer: `AdaBelief` or `ShardedAdaBelief`, or None for weights alone.
        scaler: A `torch.amp.GradScaler`, or None.
        extra: More plain values to keep.

    Raises:
        ValueError: A parameter has no name, or something cannot be saved.
    """
    if model is None and optimizer is None:
        raise ValueError("there is nothing to save: pass model, optimizer, or both.")
    check_plain(extra or {})
    settle(optimizer)
    found: dict[str, Any] = {}
    names: list[str] = []
    aliases: dict[str, str] = {}
    memory_order: dict[str, list[int]] = {}
    owned: dict[int, str] = {}
    if optimizer is not None:
        names = parameter_names(optimizer, model)
        rank = optimizer.comm.rank if isinstance(optimizer, ShardedAdaBelief) else 0
        for holding in holdings(optimizer, names):
            found |= entries_of(holding, rank)
            owned[id(holding.param)] = holding.name
            if any(key.endswith("_exponent") for key in holding.tensors):
                memory_order[holding.name] = list(holding.order)
    if model is not None:
        for name, value in model_tensors(model):
            held_as = owned.get(id(value))
            if held_as is None and isinstance(value, Tensor):
                owned[id(value)] = name
                value = value.detach()
            if held_as is None:
                found[weight_key(name)] = value
            elif held_as != name:
                aliases[name] = held_as
    description = describe(optimizer, names, aliases)
    description["memory_order"] = memory_order
    description["scaler"] = None if scaler is None else scaler.state_dict()
    return {**found, DESCRIPTION: (description,), EXTRA: (dict(extra or {}),)}


def write(
    team: Collectives,
    group: dist.ProcessGroup | None,
    run: Path,
    step: int,
    entries: dict[str, Any],
    keep: int | None,
) -> tuple[Path, int]:
    """Write a checkpoint; called by all ranks.

    Returns:
        Where it is, and how many bytes this rank has written.

    Raises:
        CheckpointError: On every rank. What was there before is as it was.
    """
    what = f"cannot save step {step} to {run}"
    is_first = team.rank == 0
    begun = together(team, what, lambda: folders.begin(run, step) if is_first else None)
    temporary = team.exchange(begun)[0]
    assert temporary is not None
    try:
        aliases = entries[DESCRIPTION][0]["aliases"]
        writer = SummingWriter(
            temporary, {weight_key(alias): weight_key(name) for alias, name in aliases.items()}
        )
        alone = team.world_size == 1
        quiet_about_one_process()
        try:
            dcp.save(entries, storage_writer=writer, process_group=group, no_dist=alone)
        except CheckpointException as failure:
            raise of_dcp(what, failure) from None
        sums = {name: s for theirs in team.exchange(writer.sums) for name, s in theirs.items()}

        def publish() -> Path | None:
            if not is_first:
                return None
            write_manifest(temporary, sums, step)
            final = folders.publish(temporary, step)
            if keep is not None:
                folders.retain(run, keep)
            return final

        published = team.exchange(together(team, what, publish))[0]
        assert published is not None
    except CheckpointError:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return published, sum(s.nbytes for s in writer.sums.values())


def save(
    run: str | Path,
    step: int,
    *,
    model: torch.nn.Module | None = None,
    optimizer: Optimizer | None = None,
    scaler: Any = None,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Saved:
    """Write a checkpoint of a run; called by all ranks.

    Every rank writes what it owns into one file. The checkpoint appears under its name when all of
    it is on the disk; a process that is killed, or a full disk, leaves what was there before.

    Args:
        run: The folder of the run, which all ranks see; made if need be.
        step: Names the checkpoint; one of the same step is replaced.
        model: Whose weights and buffers are saved; None for the optimizer's parameters alone.
        optimizer: `AdaBelief` (alone, under DDP or FSDP2) or `ShardedAdaBelief`.
        scaler: The `torch.amp.GradScaler` of the run.
        extra: More plain values to keep: numbers, strings, tensors, lists and dicts of them.
        keep: Remove all but so many of the newest checkpoints.
        process_group: The ranks; None means the optimizer's, or all.

    Raises:
        CheckpointError: On every rank, naming what is wrong.
    """
    begin = time.perf_counter()
    run = Path(run)
    team = team_of(optimizer, process_group)

    def collect() -> dict[str, Any]:
        check_arguments(step, keep)
        return contents(model, optimizer, scaler, extra)

    entries = together(team, f"cannot save step {step} to {run}", collect)
    path, nbytes = write(team, team.group, run, step, entries, keep)
    seconds = time.perf_counter() - begin
    return Saved(path, step, seconds, seconds, nbytes)


def check_arguments(step: int, keep: int | None) -> None:
    """Check what every save takes.

    Raises:
        ValueError: It is out of range.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer >= 0, got {step!r}.")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep must be an integer >= 1 or None, got {keep!r}.")


def quiet_about_one_process() -> None:
    """Let DCP not warn that there is one process only: that is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")
