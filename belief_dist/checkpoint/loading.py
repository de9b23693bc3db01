"""Load a checkpoint: find and verify it, check that it fits, then read it into the live tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_loader as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from belief_dist.checkpoint import run_directory
from belief_dist.checkpoint.checksummed_files import check_files, read_manifest
from belief_dist.checkpoint.entries import (
    EXTRA_KEY,
    METADATA_KEY,
    ShardLoadPlan,
    weight_key,
)
from belief_dist.checkpoint.errors import from_dcp_failure, run_together
from belief_dist.checkpoint.local_shards import LocalShard, local_shards
from belief_dist.checkpoint.metadata import (
    apply_options,
    check_format,
    match_groups,
    other_micro_batches,
)
from belief_dist.checkpoint.names import bare, model_tensors, parameter_names
from belief_dist.checkpoint.safe_reader import SafeReader
from belief_dist.checkpoint.saving import comm_of, silence_single_process_warning, wait_pending
from belief_dist.optimizer import AdaBelief
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.collectives import Collectives

logger = logging.getLogger("belief_dist")


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        path: The checkpoint.
        step: Step of the checkpoint.
        extra: The plain values that were passed to `save` as `extra`.
        changes: Sentences about weights and states that were converted to another precision, and
            about another number of micro-batches.
    """

    path: Path
    step: int
    extra: dict[str, Any]
    changes: list[str]


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, except that entries other than tensors are unpickled without running code."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Read an entry that is not a tensor."""
        key = read_item.dest_index.fqn
        assert self.original_state_dict is not None
        self.original_state_dict[key] = torch.load(value, weights_only=True)


def verify(checkpoint: str | Path, *, step: int | None = None) -> Path:
    """Compare all files of a checkpoint with the checksums made when they were written.

    Args:
        checkpoint: A run directory, or a checkpoint in it.
        step: Which checkpoint of the run; None means the newest.

    Returns:
        The checkpoint.

    Raises:
        ValueError: Naming the first file that is missing, truncated or changed.
    """
    path = run_directory.find(Path(checkpoint), step)
    _, checksums = read_manifest(path)
    check_files(path, checksums, sorted(checksums))
    return path


def read_metadata(
    path: Path, sizes: Mapping[str, int] | None = None
) -> tuple[Metadata, dict[str, Any], dict[str, Any]]:
    """Return (DCP's metadata, ours, `extra`) of a checkpoint, without communication.

    Args:
        path: The checkpoint.
        sizes: As for `SafeReader`.

    Raises:
        ValueError: The checkpoint was not saved by belief_dist.
    """
    silence_single_process_warning()
    reader = SafeReader(path, sizes)
    dcp_metadata = reader.read_metadata()
    if METADATA_KEY not in dcp_metadata.state_dict_metadata:
        raise ValueError(f"{path} is a checkpoint of torch, but was not saved by belief_dist.")
    plain: dict[str, Any] = {METADATA_KEY: None, EXTRA_KEY: None}
    try:
        dcp.load(plain, storage_reader=reader, planner=SafePlanner(), no_dist=True)
    except CheckpointException as failure:
        raise from_dcp_failure(f"cannot read {path}", failure) from None
    metadata = plain[METADATA_KEY][0]
    check_format(metadata)
    return dcp_metadata, metadata, plain[EXTRA_KEY][0]


def files_of_metadata(path: Path, sizes: Mapping[str, int]) -> set[str]:
    """Return the names of the files that hold what `read_metadata` returns beside DCP's own.

    Args:
        path: The checkpoint, of which DCP's metadata must be there.
        sizes: As for `SafeReader`.

    Raises:
        ValueError: It is damaged.
    """
    places = SafeReader(path, sizes).read_metadata().storage_data
    return {
        place.relative_path
        for index, place in places.items()
        if index.fqn in (METADATA_KEY, EXTRA_KEY)
    }


@torch.no_grad()
def load(
    run: str | Path,
    *,
    step: int | None = None,
    model: torch.nn.Module | None = None,
    optimizer: Optimizer | None = None,
    scaler: Any = None,
    verify: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> Loaded:
    """Load a checkpoint that any world size, layout, stage and optimizer of belief_dist has saved.

    Called by all ranks; each reads what it owns. Nothing is changed before all files are verified
    and model and optimizer are found to fit.

    Args:
        run: A run directory, or a checkpoint in it.
        step: Which checkpoint of the run; None means the newest.
        model: As for `save`.
        optimizer: As for `save`; None loads weights only.
        scaler: Receives the saved loss scale.
        verify: Whether to compare the files' checksums first; every file is read by one rank.
        process_group: As for `save`.

    Raises:
        CheckpointError: On every rank, naming the file or parameter that is missing, damaged or
            does not match.
    """
    run = Path(run)
    what = f"cannot load from {run}"
    comm = comm_of(optimizer, process_group)
    first = comm.rank == 0
    # Rank 0 chooses, as other ranks may already see a newer checkpoint.
    path = comm.exchange(
        run_together(comm, what, lambda: run_directory.find(run, step) if first else None)
    )[0]
    assert path is not None
    what = f"cannot load {path}"
    saved_step, checksums = run_together(comm, what, lambda: read_manifest(path))
    if verify:
        # Dealt out from the largest to the smallest, so that all ranks read about as much.
        largest_first = sorted(checksums, key=lambda name: (-checksums[name].nbytes, name))
        mine = largest_first[comm.rank :: comm.world_size]
        run_together(comm, what, lambda: check_files(path, checksums, mine))
    return load_from(
        comm, what, path, step=saved_step, model=model, optimizer=optimizer, scaler=scaler
    )


@torch.no_grad()
def load_from(
    comm: Collectives,
    what: str,
    path: Path,
    *,
    step: int,
    model: torch.nn.Module | None,
    optimizer: Optimizer | None,
    scaler: Any,
    sizes: Mapping[str, int] | None = None,
    fetch: Callable[[set[str]], None] | None = None,
) -> Loaded:
    """Load a checkpoint whose files were compared with their checksums; called by all ranks.

    Args:
        comm: The ranks.
        what: Start of an error's message.
        path: The checkpoint; ranks may have different ones.
        step: It is of.
        model: As for `load`.
        optimizer: As for `load`.
        scaler: As for `load`.
        sizes: As for `SafeReader`.
        fetch: Called by all ranks with the names of the files that this rank will read, to make
            them present.

    Raises:
        CheckpointError: As for `load`.
    """
    dcp_metadata, metadata, extra = run_together(comm, what, lambda: read_metadata(path, sizes))
    elsewhere = _names_elsewhere(comm, what, model, optimizer)
    plan = run_together(
        comm,
        what,
        lambda: _LoadPlan(model, optimizer, scaler, dcp_metadata, metadata, elsewhere),
    )
    if fetch is not None:
        fetch(run_together(comm, what, lambda: _files_of(plan.entries, dcp_metadata)))
    # Everything fits. From here on live tensors are overwritten.
    wait_pending(optimizer)
    try:
        dcp.load(
            plan.entries,
            storage_reader=SafeReader(path, sizes),
            planner=SafePlanner(),
            process_group=comm.group,
            no_dist=comm.world_size == 1,
        )
    except CheckpointException as failure:
        raise from_dcp_failure(what, failure) from None
    plan.finish()
    if comm.rank == 0:
        for change in plan.changes:
            logger.info("loading %s: %s", path, change)
    return Loaded(path, step, extra, plan.changes)


def _names_elsewhere(
    comm: Collectives, what: str, model: torch.nn.Module | None, optimizer: Optimizer | None
) -> set[str]:
    """Return the names of all that some rank holds, if ranks hold other parameters."""
    if not (isinstance(optimizer, ShardedAdaBelief) and optimizer.ranks_hold_parts):
        return set()
    own = run_together(comm, what, lambda: parameter_names(optimizer, model))
    if model is not None:
        own += [name for name, _ in model_tensors(model)]
    return {name for names in comm.exchange(own) for name in names}


def _files_of(entries: dict[str, Any], dcp_metadata: Metadata) -> set[str]:
    """Return the names of the files from which this rank reads its part of the entries."""
    planner = SafePlanner()
    planner.set_up_planner(entries, dcp_metadata)
    places = dcp_metadata.storage_data
    return {places[item.storage_index].relative_path for item in planner.create_local_plan().items}


class _LoadPlan:
    """All that a load will do, checked before anything is changed."""

    def __init__(
        self,
        model: torch.nn.Module | None,
        optimizer: Optimizer | None,
        scaler: Any,
        dcp_metadata: Metadata,
        metadata: dict[str, Any],
        elsewhere: set[str],
    ) -> None:
        if model is None and optimizer is None:
            raise ValueError("there is nothing to load into: pass model, optimizer, or both.")
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._metadata = metadata
        self._elsewhere = elsewhere
        self.entries: dict[str, Any] = {}
        self._shard_plan = ShardLoadPlan(dcp_metadata, metadata)
        self._names: list[str] = []
        self._options: list[dict[str, Any]] = []
        self._new_states: dict[Tensor, dict[str, Any]] = {}
        owned: set[int] = set()  # ids of the optimizer's parameters
        if scaler is not None and metadata.get("scaler") is None:
            raise ValueError("it holds no loss scale; leave out scaler.")
        if optimizer is not None:
            self._plan_optimizer(optimizer, model)
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if model is not None:
            self._plan_model(model, owned, dcp_metadata)
        self.entries |= self._shard_plan.entries
        self.changes = sorted(self._shard_plan.changes)

    def _plan_optimizer(self, optimizer: Optimizer, model: torch.nn.Module | None) -> None:
        metadata = self._metadata
        if "groups" not in metadata:
            raise ValueError("it holds weights alone, and no optimizer.")
        self._names = parameter_names(optimizer, model)
        here = dict.fromkeys([*self._names, *self._elsewhere])
        _compare_names(metadata["names"], self._names, here)
        self._options = match_groups(optimizer, self._names, metadata)
        self._shard_plan.changes.update(other_micro_batches(optimizer, metadata))
        if isinstance(optimizer, AdaBelief):
            self._make_states(optimizer)
        for shard in self._local_shards(optimizer):
            self._shard_plan.add(shard)
            if isinstance(optimizer, ShardedAdaBelief):
                self._shard_plan.add_wire_errors(
                    shard, optimizer.comm.rank, optimizer.comm.world_size
                )

    def _make_states(self, optimizer: AdaBelief) -> None:
        """Make states for the parameters that have one in the checkpoint.

        They become the optimizer's in `finish` only, so that a failed load leaves it unchanged.
        """
        remaining = iter(self._names)
        for group in optimizer.param_groups:
            for param in group["params"]:
                if next(remaining) in self._metadata["steps"]:
                    self._new_states[param] = optimizer._new_state(
                        param, group["amsgrad"], param.device
                    )

    def _local_shards(self, optimizer: Optimizer) -> list[LocalShard]:
        if isinstance(optimizer, ShardedAdaBelief):
            return list(local_shards(optimizer, self._names))
        return list(local_shards(optimizer, self._names, states=self._new_states))

    def _plan_model(self, model: torch.nn.Module, owned: set[int], dcp_metadata: Metadata) -> None:
        saved = dcp_metadata.state_dict_metadata
        aliases = self._metadata["aliases"]
        own_keys = set(map(weight_key, self._elsewhere))
        tied = {weight_key(alias) for alias in aliases}
        for name, value in model_tensors(model):
            key = weight_key(aliases.get(name, name))
            own_keys.add(key)
            # Read with the optimizer (from the master), or tied to a tensor that is read already.
            if id(value) in owned or key in self.entries:
                continue
            entry = saved.get(key)
            if entry is None:
                raise ValueError(f"it has no {name!r}, which the model has: another model's?")
            if isinstance(value, Tensor):
                if not isinstance(entry, TensorStorageMetadata) or entry.size != value.shape:
                    size = tuple(getattr(entry, "size", ()))
                    raise ValueError(
                        f"the shape of {name!r} is {size} in it, and {tuple(value.shape)} here."
                    )
                self._shard_plan.note_dtype_change("weights", entry.properties.dtype, value.dtype)
                value = value.detach()
            self.entries[key] = value
        for key in saved:
            if key.startswith("model.") and key not in own_keys | tied:
                raise ValueError(
                    f"it holds {key.removeprefix('model.')!r}, which the model does not have: "
                    f"another model's?"
                )

    def finish(self) -> None:
        """Move what DCP has read to where it belongs, and set options and counters."""
        for action in self._shard_plan.finish:
            action()
        metadata, optimizer = self._metadata, self._optimizer
        if self._model is not None:
            # Tensors were read in place; extra states are new objects, to be handed to the modules.
            for name, module in bare(self._model).named_modules():
                key = weight_key(f"{name}._extra_state".lstrip("."))
                if key in self.entries and not isinstance(self.entries[key], Tensor):
                    state = self.entries[key]
                    # Checkpoints of older versions hold it as it is.
                    is_wrapped = key in self._metadata.get("wrapped", ())
                    module.set_extra_state(state[0] if is_wrapped else state)
        if self._scaler is not None:
            self._scaler.load_state_dict(metadata["scaler"])
        if optimizer is None:
            return
        apply_options(optimizer, self._options)
        if isinstance(optimizer, AdaBelief):
            optimizer.state.clear()
            optimizer.state.update(self._new_states)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for name, param in zip(self._names, params, strict=True):
            state = optimizer.state.get(param)
            if state:
                state["step"] = metadata["steps"].get(name, 0)
        if isinstance(optimizer, ShardedAdaBelief):
            optimizer.sync_params_from_masters(
                skipped_steps=metadata.get("skipped_steps", 0),
                seed=metadata.get("seed", optimizer.options.seed),
                spike_history=metadata.get("spike_history", ()),
            )


def _compare_names(saved: Sequence[str], own: Sequence[str], here: Collection[str]) -> None:
    before = set(saved)
    for name in own:
        if name not in before:
            raise ValueError(
                f"it has no parameter {name!r}, which the optimizer has: another model's?"
            )
    for name in saved:
        if name not in here:
            raise ValueError(
                f"it has parameter {name!r}, which the optimizer does not have: another model's?"
            )
