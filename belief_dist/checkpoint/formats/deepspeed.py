"""Checkpoints of DeepSpeed's ZeRO stages 1 to 3, and its universal checkpoints.

Their files are pickles of arbitrary objects, which can run code: read only files that you trust.
DeepSpeed must be installed if they hold objects of its classes.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from belief_dist.checkpoint.formats.full_state import FullState
from belief_dist.checkpoint.formats.torch_file import read_torch_file
from belief_dist.checkpoint.progress import started
from belief_dist.options import DEFAULTS, OPTION_NAMES

_STATES = ("exp_avg", "exp_avg_sq")


def _load(path: Path) -> Any:
    return read_torch_file(path, trust=True)


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    def numbers(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.name)]

    found = sorted(folder.glob(pattern), key=numbers)
    if not found:
        raise ValueError(f"{folder} is no DeepSpeed checkpoint: it has no {pattern}.")
    return found


def read_zero(folder: str | Path) -> FullState:
    """Read a ZeRO-1, 2 or 3 checkpoint: the directory of one tag, without model parallelism.

    Raises:
        ValueError: It is not such a checkpoint, or files are missing.
    """
    folder = Path(folder)
    model = _load(_by_rank(folder, "*model_states.pt")[0])
    shards = [_load(path)["optimizer_state_dict"] for path in _by_rank(folder, "*optim_states.pt")]
    stage = int(shards[0]["zero_stage"])
    ranks = shards[0]["partition_count"]
    ranks = max(ranks) if isinstance(ranks, list) else int(ranks)
    if ranks != len(shards):
        raise ValueError(f"{folder} was saved by {ranks} ranks, but has {len(shards)} shards.")
    return _read_stage3(model, shards) if stage == 3 else _read_stage12(model, shards)


def _read_stage12(model: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> FullState:
    """Read stage 1 or 2: each group is one flat tensor, cut into equal parts for the ranks."""
    base = [shard["base_optimizer_state"] for shard in shards]
    full = _start(model)
    for number, shapes in enumerate(model["param_shapes"]):
        flat = {"fp32": torch.cat([s["single_partition_of_fp32_groups"][number] for s in shards])}
        entries = [shard["state"].get(number) for shard in base]
        for key in _STATES:
            if entries[0]:
                flat[key] = torch.cat([entry[key] for entry in entries])
        step = int(entries[0]["step"]) if entries[0] else None
        paddings = shards[0].get("param_alignment_paddings")
        offset = 0
        for position, (name, shape) in enumerate(shapes.items()):
            count = math.prod(shape)
            tensors = {k: v[offset : offset + count].view(tuple(shape)) for k, v in flat.items()}
            _add(full, name, tensors, step)
            offset += count + (paddings[number][position] if paddings else 0)
    _add_groups(full, model["param_shapes"], base[0]["param_groups"])
    return _finish(full)


def _read_stage3(model: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> FullState:
    """Read stage 3: each parameter is cut over all ranks; a sub-group is one flat tensor."""
    full, ranks = _start(model), len(shards)
    if any(not flat.numel() for shard in shards for flat in shard["fp32_flat_groups"]):
        raise ValueError(
            "this checkpoint was saved with optimizer states on NVMe, whose files cannot be read "
            "here: save one with offload_optimizer's device cpu or none."
        )
    base = [shard["optimizer_state_dict"] for shard in shards]
    sub_groups = model["param_shapes"]
    groups = base[0]["param_groups"]
    for number, shapes in enumerate(sub_groups):
        entries = [shard["state"].get(number) for shard in base]
        step = int(entries[0]["step"]) if entries[0] else None
        offset = 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            part = -(-count // ranks)  # the last rank's part ends in padding

            def joined(flats: Sequence[Tensor], at: int = offset, n: int = part) -> Tensor:
                return torch.cat([flat[at : at + n] for flat in flats])

            flats = {"fp32": [shard["fp32_flat_groups"][number] for shard in shards]}
            if entries[0]:
                flats |= {key: [entry[key] for entry in entries] for key in _STATES}
            tensors = {k: joined(v)[:count].view(tuple(shape)) for k, v in flats.items()}
            _add(full, name, tensors, step)
            offset += part
    _add_groups(full, sub_groups, groups)
    return _finish(full)


def _start(model: Mapping[str, Any]) -> FullState:
    module = model.get("module") or {}
    return FullState({name: value for name, value in module.items() if isinstance(value, Tensor)})


def _add(full: FullState, name: str, tensors: Mapping[str, Tensor], step: int | None) -> None:
    # The model's own weights may be 16-bit; the master replaces them, and their dtype is kept.
    low = full.weights.get(name)
    if low is not None and low.dtype != torch.float32 and low.numel() == tensors["fp32"].numel():
        full.dtypes[name] = str(low.dtype).removeprefix("torch.")
    full.weights[name] = tensors["fp32"].clone()
    if step is not None:
        full.steps[name] = step
        full.states[name] = {key: tensors[key].clone() for key in _STATES}


def _add_groups(
    full: FullState,
    shapes: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Add param groups; a group lists the indices of its flat tensors (stage 3: sub-groups)."""
    for group in groups:
        names = [name for number in group["params"] for name in shapes[number]]
        options = {k: v for k, v in group.items() if k in OPTION_NAMES}
        full.groups.append({"params": names, "options": {**DEFAULTS, **options}})


def _finish(full: FullState) -> FullState:
    full.step = max(full.steps.values(), default=0)
    return full


def read_universal(folder: str | Path) -> FullState:
    """Read a universal checkpoint: ``zero/<name>/fp32.pt`` and so on.

    Raises:
        ValueError: It is not a universal checkpoint.
    """
    folder = Path(folder)
    if not (folder / "zero").is_dir():
        raise ValueError(f"{folder} is no universal checkpoint: it has no folder zero.")
    model = _load(_by_rank(folder, "*model_states.pt")[0])
    full = _start(model)
    options = _universal_groups(folder)
    for shapes in model["param_shapes"]:
        for name, shape in shapes.items():
            tensors = {}
            for key in ("fp32", *_STATES):
                saved = _load(folder / "zero" / name / f"{key}.pt")
                value = saved["param"] if isinstance(saved, Mapping) else saved
                tensors[key] = value.reshape(tuple(shape))
            file = folder / "zero" / name / "step.pt"
            step = int(_load(file)) if file.exists() else None
            if step is None and options:
                step = options[0].get("step")
            _add(full, name, tensors, step or int(model.get("global_steps", 0)))
    _add_groups(full, model["param_shapes"], options)
    return _finish(full)


def _universal_groups(folder: Path) -> list[dict[str, Any]]:
    file = folder / "zero" / "optimizer_state.pt"
    if not file.exists():
        raise ValueError(f"{folder} is no whole universal checkpoint: it has no {file.name}.")
    saved = _load(file)
    # The param groups are nested in one or two dicts, depending on the stage.
    while isinstance(saved, Mapping) and "param_groups" not in saved:
        inner = [key for key in ("optimizer_state_dict", "base_optimizer_state") if key in saved]
        saved = saved[inner[0]] if inner else {"param_groups": []}
    return list(saved["param_groups"]) if isinstance(saved, Mapping) else []


def write_universal(full: FullState, folder: str | Path, template: str | Path) -> None:
    """Write a universal checkpoint, which DeepSpeed loads at any number of ranks.

    Args:
        full: The training state.
        folder: A new directory.
        template: A universal checkpoint of the same job; all that does not belong to a parameter
            is copied from it.

    Raises:
        ValueError: The template belongs to another model.
    """
    folder, template = Path(folder), Path(template)
    theirs = sorted(read_universal(template).names)
    if theirs != sorted(full.names):
        odd = sorted(set(theirs) ^ set(full.names))[0]
        raise ValueError(f"the template {template} is of another model: {odd!r} is in one alone.")
    shutil.copytree(template, folder)
    nbytes = sum(full.weights[name].nbytes for name in full.names)
    advance = started(f"writing {folder.name}", nbytes)
    for name in full.names:
        values = {"fp32": full.weights[name], **full.states[name]}
        for key in ("fp32", *_STATES):
            file = folder / "zero" / name / f"{key}.pt"
            saved = _load(file)
            if isinstance(saved, dict):
                # A clone, as torch.save writes a view's whole storage.
                value = values[key].clone().reshape(saved["param"].shape)
                torch.save({**saved, "param": value}, file)
            else:
                torch.save(values[key].clone().reshape(saved.shape), file)
        if (folder / "zero" / name / "step.pt").exists():
            torch.save(full.steps[name], folder / "zero" / name / "step.pt")
        advance(full.weights[name].nbytes)
