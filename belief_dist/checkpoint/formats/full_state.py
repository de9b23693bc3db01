"""A whole training state in the memory of one process: what converters take and return."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict_loader as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from belief_dist.checkpoint.checksummed_files import read_manifest
from belief_dist.checkpoint.chunks import inverse
from belief_dist.checkpoint.entries import DESCRIPTION, EXTRA, STATES, state_key, weight_key
from belief_dist.checkpoint.loading import SafePlanner, read_description
from belief_dist.checkpoint.metadata import FORMAT
from belief_dist.checkpoint.names import dtype_name
from belief_dist.checkpoint.run_directory import find
from belief_dist.checkpoint.saving import write
from belief_dist.options import DEFAULTS
from belief_dist.sharding.collectives import SingleRank
from belief_dist.state_formats import decode_m, decode_s


@dataclass
class Whole:
    """Everything by name.

    Attributes:
        weights: As they are trained (float32 masters where there are any), and buffers.
        states: exp_avg, exp_avg_sq and maybe max_exp_avg_sq of each optimized parameter.
        steps: Its number of steps.
        groups: ``{"params": names, "options": hyperparameters}`` for each param group.
        dtypes: Of the model's parameters, where they are narrower than `weights`.
        step: Of the run.
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
        """The optimized parameters, in the order of the groups."""
        return [name for group in self.groups for name in group["params"]]

    def model_weights(self) -> dict[str, Tensor]:
        """Return weights in the model's dtypes, tied ones under each of their names."""
        found = {
            name: value.to(getattr(torch, self.dtypes[name])) if name in self.dtypes else value
            for name, value in self.weights.items()
        }
        return found | {alias: found[name] for alias, name in self.aliases.items()}


def read_whole(checkpoint: str | Path, *, step: int | None = None) -> Whole:
    """Read a checkpoint into memory; 8-bit states become float32.

    Raises:
        ValueError: It is no checkpoint, or one of a later format.
    """
    path = find(Path(checkpoint), step)
    metadata, description, _ = read_description(path)
    entries: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(entries, storage_reader=FileSystemReader(path), planner=SafePlanner(), no_dist=True)
    aliases = description["aliases"]
    weights = {
        key.removeprefix("model."): value
        for key, value in entries.items()
        if key.startswith("model.") and key.removeprefix("model.") not in aliases
    }
    steps = description.get("steps", {})
    states: dict[str, dict[str, Tensor]] = {name: {} for name in steps}
    for name in steps:
        order = description.get("memory_order", {}).get(name)
        for state in STATES:
            value = entries.get(state_key(name, state))
            if value is not None:
                exponent = entries.get(state_key(name, f"{state}_exponent"))
                states[name][state] = (
                    value if exponent is None else _decode(state, value, exponent, order)
                )
    return Whole(
        weights,
        states,
        dict(steps),
        description.get("groups", []),
        description.get("dtypes", {}),
        dict(aliases),
        read_manifest(path)[0],
    )


def _decode(state: str, codes: Tensor, exponents: Tensor, order: Any) -> Tensor:
    decode = decode_m if state == "exp_avg" else decode_s
    moved = codes.permute(order)
    values = decode(moved.reshape(-1), exponents).view(moved.shape)
    return values.permute(inverse(order))


def write_whole(whole: Whole, run: str | Path) -> Path:
    """Write a checkpoint of a run from memory, and return its path.

    Raises:
        CheckpointError: It cannot be written.
    """
    entries: dict[str, Any] = {
        weight_key(name): value.contiguous() for name, value in whole.weights.items()
    }
    for name, states in whole.states.items():
        for state, value in states.items():
            entries[state_key(name, state)] = value.contiguous()
    description: dict[str, Any] = {
        "format": FORMAT,
        "names": whole.names,
        "aliases": whole.aliases,
        "memory_order": {},
        "scaler": None,
    }
    if whole.groups:
        groups = [
            {"params": list(g["params"]), "options": {**DEFAULTS, **g["options"]}}
            for g in whole.groups
        ]
        dtypes = {name: dtype_name(whole.weights[name]) for name in whole.names} | whole.dtypes
        description |= {"groups": groups, "steps": dict(whole.steps), "dtypes": dtypes}
    entries |= {DESCRIPTION: (description,), EXTRA: ({},)}
    return write(SingleRank(), None, Path(run), whole.step, entries, None)[0]
