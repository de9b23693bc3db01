"""The full training state in the memory of one process, which the converters take and return."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict_loader as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from belief_dist.checkpoint.checksummed_files import check_files, read_manifest
from belief_dist.checkpoint.chunks import inverse
from belief_dist.checkpoint.entries import EXTRA_KEY, METADATA_KEY, STATES, state_key, weight_key
from belief_dist.checkpoint.loading import SafePlanner, read_metadata
from belief_dist.checkpoint.metadata import FORMAT
from belief_dist.checkpoint.names import dtype_name
from belief_dist.checkpoint.progress import started
from belief_dist.checkpoint.run_directory import find
from belief_dist.checkpoint.safe_reader import SafeReader
from belief_dist.checkpoint.saving import write
from belief_dist.options import DEFAULTS
from belief_dist.sharding.collectives import SingleRank
from belief_dist.state_dict import AVERAGE
from belief_dist.state_formats import decode_m, decode_s


@dataclass
class FullState:
    """Weights, optimizer states and options, by parameter name.

    Attributes:
        weights: Weights as they are trained (the float32 master, if there is one), and buffers.
        states: exp_avg, exp_avg_sq and maybe max_exp_avg_sq and param_ema of each optimized
            parameter.
        steps: Number of steps of each optimized parameter.
        groups: ``{"params": names, "options": hyperparameters}`` for each param group.
        dtypes: Dtypes of the model's parameters, where they differ from those of `weights`.
        aliases: Further names of tied weights, each with the name in `weights`.
        step: Step of the run.
    """

    weights: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    step: int = 0

    @property
    def names(self) -> list[str]:
        """Names of the optimized parameters, in the order of the groups."""
        return [name for group in self.groups for name in group["params"]]

    def model_weights(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """Return the weights in the model's dtypes, tied ones under each of their names.

        Args:
            averaged: Take the average of each weight that was trained.

        Raises:
            ValueError: There are no averages.
        """
        weights = dict(self.weights)
        if averaged:
            lacking = [name for name in self.names if AVERAGE not in self.states.get(name, {})]
            if lacking or not self.names:
                raise ValueError(
                    "it holds no averages of the weights, which ShardedAdaBelief keeps with "
                    "ema_decay."
                )
            weights |= {name: self.states[name][AVERAGE] for name in self.names}
        found = {
            name: value.to(getattr(torch, self.dtypes[name])) if name in self.dtypes else value
            for name, value in weights.items()
        }
        return found | {alias: found[name] for alias, name in self.aliases.items()}


class _CountingPlanner(SafePlanner):
    """Tells how many bytes of tensors are read."""

    def __init__(self, what: str, nbytes: int) -> None:
        super().__init__()
        self._advance = started(what, nbytes)

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        """Take a part of a tensor that was read."""
        super().commit_tensor(read_item, tensor)
        self._advance(tensor.nbytes)


def read_full_state(checkpoint: str | Path, *, step: int | None = None) -> FullState:
    """Read a checkpoint into memory; 8-bit states are decoded to float32.

    Raises:
        ValueError: There is no checkpoint, it has a later format, or a file has changed.
    """
    path = find(Path(checkpoint), step)
    saved_step, checksums = read_manifest(path)
    check_files(path, checksums, sorted(checksums))
    dcp_metadata, metadata, _ = read_metadata(path)
    entries: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in dcp_metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    planner = _CountingPlanner(f"reading {path.name}", sum(e.nbytes for e in entries.values()))
    dcp.load(entries, storage_reader=SafeReader(path), planner=planner, no_dist=True)
    aliases = metadata["aliases"]
    weights = {
        key.removeprefix("model."): value
        for key, value in entries.items()
        if key.startswith("model.") and key.removeprefix("model.") not in aliases
    }
    steps = metadata.get("steps", {})
    states: dict[str, dict[str, Tensor]] = {name: {} for name in steps}
    for name in steps:
        order = metadata.get("memory_order", {}).get(name)
        for state in STATES:
            value = entries.get(state_key(name, state))
            if value is not None:
                exponent = entries.get(state_key(name, f"{state}_exponent"))
                states[name][state] = (
                    value if exponent is None else _decode(state, value, exponent, order)
                )
    return FullState(
        weights,
        states,
        dict(steps),
        metadata.get("groups", []),
        metadata.get("dtypes", {}),
        dict(aliases),
        saved_step,
    )


def _decode(state: str, codes: Tensor, exponents: Tensor, order: Any) -> Tensor:
    decode = decode_m if state == "exp_avg" else decode_s
    # Blocks count elements in memory order, so decode with the dimensions in that order.
    moved = codes.permute(order)
    values = decode(moved.reshape(-1), exponents).view(moved.shape)
    return values.permute(inverse(order))


def write_full_state(full: FullState, run: str | Path) -> Path:
    """Write a checkpoint into a run directory, and return its path.

    Raises:
        CheckpointError: It cannot be written.
    """
    entries: dict[str, Any] = {
        weight_key(name): value.contiguous() for name, value in full.weights.items()
    }
    for name, states in full.states.items():
        for state, value in states.items():
            entries[state_key(name, state)] = value.contiguous()
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "names": full.names,
        "aliases": full.aliases,
        "memory_order": {},
        "scaler": None,
    }
    if full.groups:
        groups = [
            {"params": list(g["params"]), "options": {**DEFAULTS, **g["options"]}}
            for g in full.groups
        ]
        dtypes = {name: dtype_name(full.weights[name]) for name in full.names} | full.dtypes
        metadata |= {"groups": groups, "steps": dict(full.steps), "dtypes": dtypes}
    entries |= {METADATA_KEY: (metadata,), EXTRA_KEY: ({},)}
    return write(SingleRank(), None, Path(run), full.step, entries, None)[0]
