"""Save a checkpoint, atomically: it appears under its name when all of it is on the disk."""

from __future__ import annotations

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

from belief_dist.checkpoint import run_directory
from belief_dist.checkpoint.checksummed_files import Checksum, ChecksumWriter, write_manifest
from belief_dist.checkpoint.entries import EXTRA_KEY, METADATA_KEY, shard_entries, weight_key
from belief_dist.checkpoint.errors import CheckpointError, from_dcp_failure, run_together
from belief_dist.checkpoint.local_shards import local_shards
from belief_dist.checkpoint.metadata import make_metadata, merge_metadata
from belief_dist.checkpoint.names import model_tensors, parameter_names
from belief_dist.checkpoint.plain_values import plain_extra, to_plain
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.collectives import BackendReduceScatter, Collectives, SingleRank


@dataclass(frozen=True)
class Saved:
    """The result of a save.

    Attributes:
        path: The checkpoint.
        step: Step of the checkpoint.
        blocked: Seconds for which the caller was blocked.
        seconds: Seconds from the call until the checkpoint was complete.
        nbytes: Bytes written by this rank.
    """

    path: Path
    step: int
    blocked: float
    seconds: float
    nbytes: int


def comm_of(optimizer: Optimizer | None, group: dist.ProcessGroup | None) -> Collectives:
    """Return the ranks that save or load together.

    Args:
        optimizer: Without `group`, a `ShardedAdaBelief` determines the ranks.
        group: The ranks; None means the optimizer's, or all.
    """
    if group is None and isinstance(optimizer, ShardedAdaBelief):
        if not optimizer.is_model_parallel:
            return optimizer.comm
    if not (dist.is_available() and dist.is_initialized()):
        return SingleRank()
    if dist.get_world_size(group) == 1:
        return SingleRank()
    return BackendReduceScatter(group if group is not None else dist.group.WORLD)


def wait_pending(optimizer: Optimizer | None) -> None:
    """Wait until the optimizer's pending communication is complete."""
    if isinstance(optimizer, ShardedAdaBelief):
        optimizer.wait_pending()


@torch.no_grad()
def contents(
    model: torch.nn.Module | None,
    optimizer: Optimizer | None,
    scaler: Any = None,
    extra: Mapping[str, Any] | None = None,
    *,
    has_buffers: bool = True,
) -> dict[str, Any]:
    """Return all entries that this rank writes, as a state_dict for `torch.distributed.checkpoint`.

    Waits for pending communication first. Tensors share the live memory.

    Args:
        model: The model, for weights and buffers; None saves the optimizer's parameters only.
        optimizer: `AdaBelief` or `ShardedAdaBelief`; None saves weights only.
        scaler: A `torch.amp.GradScaler`, or None.
        extra: Further plain values.
        has_buffers: Whether this rank writes the model's buffers. Ranks may have different ones,
            and a mean of one with a variance of another would be nobody's.

    Raises:
        ValueError: A parameter has no name, or something cannot be saved.
        RuntimeError: States have lost bits, see `ShardedAdaBelief.check_states`.
    """
    if model is None and optimizer is None:
        raise ValueError("there is nothing to save: pass model, optimizer, or both.")
    plain = plain_extra(extra or {})
    wait_pending(optimizer)
    if isinstance(optimizer, ShardedAdaBelief):
        optimizer.check_states()
    found: dict[str, Any] = {}
    names: list[str] = []
    aliases: dict[str, str] = {}
    memory_order: dict[str, list[int]] = {}
    wrapped: list[str] = []
    buffers: list[str] = []
    owned: dict[int, str] = {}  # by id of a tensor, the name it is saved under
    if optimizer is not None:
        names = parameter_names(optimizer, model)
        rank = optimizer.comm.rank if isinstance(optimizer, ShardedAdaBelief) else 0
        for shard in local_shards(optimizer, names):
            found |= shard_entries(shard, rank)
            owned[id(shard.param)] = shard.name
            # Blocks of 8-bit states count elements in memory order, which the reader must know.
            if any(key.endswith("_exponent") for key in shard.tensors):
                memory_order[shard.name] = list(shard.order)
    if model is not None:
        ids = set(map(id, model.buffers()))
        for name, value in model_tensors(model):
            if id(value) in ids:
                buffers.append(weight_key(name))
                if not has_buffers:
                    continue
            held_as = owned.get(id(value))
            if held_as is None and isinstance(value, Tensor):
                owned[id(value)] = name
                value = value.detach()
            if held_as is None and not isinstance(value, Tensor):
                # An extra state. In a tuple, because DCP would flatten a dict into entries.
                value = (to_plain(value, f"the extra state {name!r} of the model"),)
                wrapped.append(weight_key(name))
            if held_as is None:
                found[weight_key(name)] = value
            elif held_as != name:  # a tied weight, saved once
                aliases[name] = held_as
    metadata = make_metadata(optimizer, names, aliases)
    metadata["memory_order"] = memory_order
    metadata["wrapped"] = wrapped
    metadata["buffers"] = buffers
    metadata["scaler"] = None if scaler is None else to_plain(scaler.state_dict(), "the scaler")
    # In tuples, because DCP would flatten dicts into one entry for each key.
    return {**found, METADATA_KEY: (metadata,), EXTRA_KEY: (plain,)}


def describe_all(comm: Collectives, optimizer: Optimizer | None, entries: dict[str, Any]) -> None:
    """Put into `entries`, from `contents`, what other ranks hold; called by all ranks."""
    if isinstance(optimizer, ShardedAdaBelief) and optimizer.ranks_hold_parts:
        entries[METADATA_KEY] = (merge_metadata(comm.exchange(entries[METADATA_KEY][0])),)


def write(
    comm: Collectives,
    group: dist.ProcessGroup | None,
    run: Path,
    step: int,
    entries: dict[str, Any],
    keep: int | None,
) -> tuple[Path, int]:
    """Write a checkpoint; called by all ranks.

    Returns:
        Its path, and the number of bytes that this rank has written.

    Raises:
        CheckpointError: On every rank; earlier checkpoints are unchanged.
    """
    what = f"cannot save step {step} to {run}"
    is_first = comm.rank == 0
    # Only rank 0 works on directories; the others need the temporary name that it has chosen.
    begun = run_together(comm, what, lambda: run_directory.begin(run, step) if is_first else None)
    temporary = comm.exchange(begun)[0]
    assert temporary is not None
    try:
        own = write_files(comm, group, what, temporary, entries)
        checksums = {name: s for theirs in comm.exchange(own) for name, s in theirs.items()}

        # Every rank's file has been flushed to the disk when `exchange` has returned.
        def publish() -> Path | None:
            if not is_first:
                return None
            write_manifest(temporary, checksums, step, run_directory.next_serial(run))
            final = run_directory.publish(temporary, step)
            if keep is not None:
                run_directory.retain(run, keep)
            return final

        published = comm.exchange(run_together(comm, what, publish))[0]
        assert published is not None
    except CheckpointError:
        # Raised on all ranks, so no rank still writes there.
        if is_first:
            run_directory.give_up(temporary)
        raise
    return published, sum(s.nbytes for s in own.values())


def write_files(
    comm: Collectives,
    group: dist.ProcessGroup | None,
    what: str,
    folder: Path,
    entries: dict[str, Any],
) -> dict[str, Checksum]:
    """Write the files of a checkpoint into a folder; called by all ranks.

    Args:
        comm: The ranks.
        group: Theirs.
        what: Start of an error's message.
        folder: Ranks may have different ones.
        entries: From `contents`.

    Returns:
        The checksums of the files that this rank has written.

    Raises:
        CheckpointError: On every rank.
    """
    aliases = entries[METADATA_KEY][0]["aliases"]
    writer = ChecksumWriter(
        folder, {weight_key(alias): weight_key(name) for alias, name in aliases.items()}
    )
    silence_single_process_warning()
    alone = comm.world_size == 1
    try:
        dcp.save(entries, storage_writer=writer, process_group=group, no_dist=alone)
    except CheckpointException as failure:
        raise from_dcp_failure(what, failure) from None
    return writer.checksums


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

    Every rank writes one file, with what it owns. The checkpoint appears under its name when all of
    it is on the disk; if a process is killed or the disk is full, earlier checkpoints remain.

    Args:
        run: The run directory, on a file system that all ranks share; created if it is missing.
        step: Names the checkpoint; an existing one of the same step is replaced.
        model: Its weights and buffers are saved; None saves the optimizer's parameters only.
        optimizer: `AdaBelief` (alone, under DDP or FSDP2) or `ShardedAdaBelief`.
        scaler: The `torch.amp.GradScaler` of the run.
        extra: Further plain values: numbers, strings, tensors, lists and dicts of them.
        keep: Keep this many of the newest checkpoints and remove the others; None keeps all.
        process_group: The ranks; None means the optimizer's, or all.

    Raises:
        CheckpointError: On every rank, naming what is wrong.
    """
    begin = time.perf_counter()
    run = Path(run)
    comm = comm_of(optimizer, process_group)

    def collect() -> dict[str, Any]:
        check_arguments(step, keep)
        return contents(model, optimizer, scaler, extra, has_buffers=comm.rank == 0)

    entries = run_together(comm, f"cannot save step {step} to {run}", collect)
    describe_all(comm, optimizer, entries)
    path, nbytes = write(comm, comm.group, run, step, entries, keep)
    seconds = time.perf_counter() - begin
    return Saved(path, step, seconds, seconds, nbytes)


def check_arguments(step: int, keep: int | None) -> None:
    """Check the arguments that every save takes.

    Raises:
        ValueError: One is out of range.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer >= 0, got {step!r}.")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep must be an integer >= 1 or None, got {keep!r}.")


def silence_single_process_warning() -> None:
    """Silence DCP's warning about running without torch.distributed, which is intended here."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")
