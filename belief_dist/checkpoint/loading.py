"""Load: find, verify, compare, and only then read into the live tensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_loader as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from belief_dist.checkpoint import run_directory as folders
from belief_dist.checkpoint.checksummed_files import check_files, read_manifest
from belief_dist.checkpoint.entries import (
    DESCRIPTION,
    EXTRA,
    Reading,
    weight_key,
)
from belief_dist.checkpoint.errors import of_dcp, together
from belief_dist.checkpoint.local_shards import Holding, holdings
from belief_dist.checkpoint.metadata import apply_options, check_format, match_groups
from belief_dist.checkpoint.names import bare, model_tensors, parameter_names
from belief_dist.checkpoint.saving import quiet_about_one_process, settle, team_of
from belief_dist.optimizer import AdaBelief
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.collectives import Collectives

logger = logging.getLogger("belief_dist")


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        path: The checkpoint.
        step: Its step.
        extra: What was saved as `extra`.
        changes: Sentences about what changed precision on the way.
    """

    path: Path
    step: int
    extra: dict[str, Any]
    changes: list[str]


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, but entries that are no tensors are plain values and run no code."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Read one entry."""
        key = read_item.dest_index.fqn
        assert self.original_state_dict is not None
        self.original_state_dict[key] = torch.load(value, weights_only=True)


def verify(checkpoint: str | Path, *, step: int | None = None) -> Path:
    """Compare all files of a checkpoint with the checksums that were made when it was written.

    Args:
        checkpoint: A run's folder, or a checkpoint.
        step: Of a run, which one; None means the newest.

    Returns:
        The checkpoint.

    Raises:
        ValueError: Naming the first file that is missing, truncated or changed.
    """
    path = folders.find(Path(checkpoint), step)
    _, sums = read_manifest(path)
    check_files(path, sums, sorted(sums))
    return path


def read_description(path: Path) -> tuple[Metadata, dict[str, Any], dict[str, Any]]:
    """Return (DCP's metadata, the description, what was saved as extra) of a checkpoint.

    Reads on this process alone.

    Raises:
        ValueError: It is no checkpoint of ours.
    """
    quiet_about_one_process()
    reader = FileSystemReader(path)
    metadata = reader.read_metadata()
    if DESCRIPTION not in metadata.state_dict_metadata:
        raise ValueError(f"{path} is a checkpoint of torch, but was not saved by belief_dist.")
    plain: dict[str, Any] = {DESCRIPTION: None, EXTRA: None}
    try:
        dcp.load(plain, storage_reader=reader, planner=SafePlanner(), no_dist=True)
    except CheckpointException as failure:
        raise of_dcp(f"cannot read {path}", failure) from None
    description = plain[DESCRIPTION][0]
    check_format(description)
    return metadata, description, plain[EXTRA][0]


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
    """Load a checkpoint, whatever world size, layout, stage or optimizer of ours has saved it.

    Called by all ranks; each reads what it owns. Nothing is changed before all files were verified
    and everything was found to fit.

    Args:
        run: The folder of a run, or a checkpoint in it.
        step: Which checkpoint of the run; None means the newest.
        model: As for `save`.
        optimizer: As for `save`; None loads weights alone.
        scaler: Takes the saved loss scale.
        verify: Read all files once, each on one rank, to compare their checksums.
        process_group: As for `save`.

    Raises:
        CheckpointError: On every rank, naming the file or parameter that is missing, damaged or
            does not fit.
    """
    run = Path(run)
    what = f"cannot load from {run}"
    team = team_of(optimizer, process_group)
    first = team.rank == 0
    path = team.exchange(together(team, what, lambda: folders.find(run, step) if first else None))[
        0
    ]
    assert path is not None
    what = f"cannot load {path}"
    saved_step, sums = together(team, what, lambda: read_manifest(path))
    if verify:
        largest_first = sorted(sums, key=lambda name: (-sums[name].nbytes, name))
        mine = largest_first[team.rank :: team.world_size]
        together(team, what, lambda: check_files(path, sums, mine))
    metadata, description, extra = together(team, what, lambda: read_description(path))
    plan = together(
        team, what, lambda: _Plan(model, optimizer, scaler, metadata, description, team)
    )
    settle(optimizer)
    try:
        dcp.load(
            plan.entries,
            storage_reader=FileSystemReader(path),
            planner=SafePlanner(),
            process_group=team.group,
            no_dist=team.world_size == 1,
        )
    except CheckpointException as failure:
        raise of_dcp(what, failure) from None
    plan.finish()
    if team.rank == 0:
        for change in plan.changes:
            logger.info("loading %s: %s", path, change)
    return Loaded(path, saved_step, extra, plan.changes)


class _Plan:
    """Everything that a load will do, checked before any of it is done."""

    def __init__(
        self,
        model: torch.nn.Module | None,
        optimizer: Optimizer | None,
        scaler: Any,
        metadata: Metadata,
        description: dict[str, Any],
        team: Collectives,
    ) -> None:
        if model is None and optimizer is None:
            raise ValueError("there is nothing to load into: pass model, optimizer, or both.")
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._description = description
        self.entries: dict[str, Any] = {}
        self._reading = Reading(metadata, description)
        self._names: list[str] = []
        self._options: list[dict[str, Any]] = []
        self._new_states: dict[Tensor, dict[str, Any]] = {}
        owned: set[int] = set()
        if scaler is not None and description.get("scaler") is None:
            raise ValueError("it holds no loss scale; leave out scaler.")
        if optimizer is not None:
            self._plan_optimizer(optimizer, model, team)
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if model is not None:
            self._plan_model(model, owned, metadata)
        self.entries |= self._reading.entries
        self.changes = sorted(self._reading.changes)

    def _plan_optimizer(
        self, optimizer: Optimizer, model: torch.nn.Module | None, team: Collectives
    ) -> None:
        description = self._description
        if "groups" not in description:
            raise ValueError("it holds weights alone, and no optimizer.")
        self._names = parameter_names(optimizer, model)
        _compare_names(description["names"], self._names)
        self._options = match_groups(optimizer, self._names, description)
        if isinstance(optimizer, AdaBelief):
            self._make_states(optimizer)
        for holding in self._held(optimizer):
            self._reading.add(holding)
            if isinstance(optimizer, ShardedAdaBelief):
                self._reading.add_errors(holding, optimizer.comm.rank, optimizer.comm.world_size)

    def _make_states(self, optimizer: AdaBelief) -> None:
        """Make states for what has one in the checkpoint; they are the optimizer's at the end."""
        remaining = iter(self._names)
        for group in optimizer.param_groups:
            for param in group["params"]:
                if next(remaining) in self._description["steps"]:
                    self._new_states[param] = optimizer._new_state(
                        param, group["amsgrad"], param.device
                    )

    def _held(self, optimizer: Optimizer) -> list[Holding]:
        if isinstance(optimizer, ShardedAdaBelief):
            return list(holdings(optimizer, self._names))
        return list(holdings(optimizer, self._names, states=self._new_states))

    def _plan_model(self, model: torch.nn.Module, owned: set[int], metadata: Metadata) -> None:
        saved = metadata.state_dict_metadata
        aliases = self._description["aliases"]
        own_keys, tied = set(), {weight_key(alias) for alias in aliases}
        for name, value in model_tensors(model):
            key = weight_key(aliases.get(name, name))
            own_keys.add(key)
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
                self._reading.note("weights", entry.properties.dtype, value.dtype)
                value = value.detach()
            self.entries[key] = value
        for key in saved:
            if key.startswith("model.") and key not in own_keys | tied:
                raise ValueError(
                    f"it holds {key.removeprefix('model.')!r}, which the model does not have: "
                    f"another model's?"
                )

    def finish(self) -> None:
        """Do what is left when DCP has filled all entries."""
        for finish in self._reading.finish:
            finish()
        description, optimizer = self._description, self._optimizer
        if self._model is not None:
            for name, module in bare(self._model).named_modules():
                key = weight_key(f"{name}._extra_state".lstrip("."))
                if key in self.entries and not isinstance(self.entries[key], Tensor):
                    module.set_extra_state(self.entries[key])
        if self._scaler is not None:
            self._scaler.load_state_dict(description["scaler"])
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
                state["step"] = description["steps"].get(name, 0)
        if isinstance(optimizer, ShardedAdaBelief):
            optimizer.sync_params_from_masters(
                skipped_steps=description.get("skipped_steps", 0),
                seed=description.get("seed", optimizer.options.seed),
            )


def _compare_names(saved: Sequence[str], own: Sequence[str]) -> None:
    before, here = set(saved), set(own)
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
