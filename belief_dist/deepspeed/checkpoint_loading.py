"""Complete what DeepSpeed's checkpoint loaders leave out.

These are the hyperparameters of all param groups but the first at stage 3, ranks that hold no part
of a group at stages 1 and 2, and optimizer states on NVMe.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from belief_dist.deepspeed.wrapping import Wrapper, answer_once

_SUFFIX = ".tensor.swp"


def _restore_groups(groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Set each param group's options to those of the saved group at the same position."""
    for group, saved_group in zip(groups, saved, strict=True):
        group.update({key: value for key, value in saved_group.items() if key != "params"})


def _check_groups(zero: Any, saved: Sequence[Mapping[str, Any]], source: Path) -> None:
    if len(saved) != len(zero.optimizer.param_groups):
        raise ValueError(
            f"{source} holds {len(saved)} param groups, this optimizer has "
            f"{len(zero.optimizer.param_groups)}; build it with the groups it was saved with."
        )


def load_universal_stage12(
    optimizer_cls: type[Optimizer],
    original: Wrapper,
    zero: Any,
    groups_name: str,
    checkpoint_dir: str,
) -> None:
    """Load a universal checkpoint, also on ranks that hold no part of a param group.

    A group with few elements ends before the last ranks' partitions begin, which are padding only.
    DeepSpeed fails there, looking for a step in an empty list, so it gets the other groups only.
    """
    optimizer, params = zero.optimizer, getattr(zero, groups_name)
    if not isinstance(optimizer, optimizer_cls):
        original(zero, groups_name, checkpoint_dir)
        return
    folder = Path(checkpoint_dir, "zero")
    file = folder / "optimizer_state.pt"
    saved = _load(file)["param_groups"]
    _check_groups(zero, saved, file)
    groups = optimizer.param_groups
    held = [any(param._hp_mapping is not None for param in group) for group in params]
    try:
        optimizer.param_groups = list(compress(groups, held))
        setattr(zero, groups_name, list(compress(params, held)))
        original(zero, groups_name, checkpoint_dir)
    finally:
        optimizer.param_groups = groups
        setattr(zero, groups_name, params)
    _restore_groups(groups, saved)
    for group, own, has_part in zip(groups, params, held, strict=True):
        if not has_part:
            (padding,) = group["params"]
            optimizer.state[padding] = {
                "step": _load(folder / zero.param_names[own[0]] / "step.pt"),
                "exp_avg": torch.zeros_like(padding),
                "exp_avg_sq": torch.zeros_like(padding),
            }


def load_universal_stage3(
    optimizer_cls: type[Optimizer], original: Wrapper, zero: Any, checkpoint_dir: str
) -> None:
    """Restore every group's own options; DeepSpeed copies those of the first group into all."""
    if not isinstance(zero.optimizer, optimizer_cls):
        original(zero, checkpoint_dir)
        return
    file = Path(checkpoint_dir, "zero", "optimizer_state.pt")
    saved = _load(file)["optimizer_state_dict"]["param_groups"]
    _check_groups(zero, saved, file)
    original(zero, checkpoint_dir)
    _restore_groups(zero.optimizer.param_groups, saved)


def load_checkpoint(
    optimizer_cls: type[Optimizer], original: Wrapper, engine: Any, *args: Any, **kwargs: Any
) -> Any:
    """Load a checkpoint, also into an optimizer whose states are on NVMe.

    DeepSpeed copies the saved swap files and reads the masters from them, but it restores neither
    steps nor options nor moments, and nothing of sub-groups too small to be swapped. These are
    restored first; the moments in swap files are then read along with the masters.
    """
    zero = engine.optimizer
    on_nvme = getattr(zero, "swap_optimizer", False) and isinstance(zero.optimizer, optimizer_cls)
    if not on_nvme:
        return original(engine, *args, **kwargs)
    call = inspect.signature(original).bind(engine, *args, **kwargs)
    call.apply_defaults()
    folder = _tag_folder(engine, call.arguments["load_dir"], call.arguments["tag"])
    if folder is None:
        return original(engine, *args, **kwargs)  # which warns that there is no checkpoint
    if call.arguments["load_module_only"] or not call.arguments["load_optimizer_states"]:
        raise ValueError(
            "DeepSpeed cannot load weights without optimizer states into an engine with "
            "offload_optimizer's device nvme: load them with device cpu or none."
        )
    shard = _own_shard(engine, folder)
    names = _swap_names(engine, folder)
    _prepare_swapped(zero, shard)
    reset = zero.reset_swap_buffers

    def reset_swap_buffers() -> None:
        swap_folder = Path(zero.optimizer_swapper.swap_folder)
        for saved, name in names.items():
            shutil.copyfile(saved, swap_folder / name)
        for file in {saved.name for saved in names} - set(names.values()):
            (swap_folder / file).unlink()
        reset()

    # The engine calls this after it has copied the files, under the names they were saved with.
    answer_once(zero, "reset_swap_buffers", reset_swap_buffers)
    return original(engine, *args, **kwargs)


def _tag_folder(engine: Any, load_dir: str, tag: str | None) -> Path | None:
    if engine.load_universal_checkpoint():
        raise ValueError(
            "DeepSpeed cannot load a universal checkpoint into an optimizer on NVMe: load it with "
            "offload_optimizer's device cpu."
        )
    if tag is None:
        latest = Path(load_dir, "latest")
        if not latest.is_file():
            return None
        tag = latest.read_text().strip()
    return Path(load_dir, str(tag))


def _own_shard(engine: Any, folder: Path) -> dict[str, Any]:
    """Return this rank's part of the saved optimizer, after checking that it fits this one."""
    zero = engine.optimizer
    file = Path(engine._get_zero_ckpt_name(str(folder.parent), folder.name))
    ranks = len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))
    if ranks != engine.dp_world_size or not file.is_file():
        raise ValueError(
            f"{folder} holds the optimizer states of {ranks} ranks, these are "
            f"{engine.dp_world_size}; states on NVMe can only be loaded by as many ranks as saved "
            f"them. To change the number of ranks, save with offload_optimizer's device cpu and "
            f"make a universal checkpoint of that."
        )
    shard: dict[str, Any] = _load(file)["optimizer_state_dict"]
    _check_groups(zero, shard["optimizer_state_dict"]["param_groups"], folder)
    masters = shard["fp32_flat_groups"]
    sizes = [int(size) for size in zero.fp16_partitioned_groups_flat_numel]
    swapped = [zero._swappable_optimizer_subgroup(i) for i in range(len(sizes))]
    saved = [flat.numel() for flat in masters]
    if saved != [0 if away else size for size, away in zip(sizes, swapped, strict=True)]:
        raise ValueError(
            f"{folder} was saved with other sub-groups on NVMe ({saved} elements of each are in "
            f"its files, here each has {sizes}): load it with the model, sub_group_size, aio block "
            f"and offload_optimizer device that it was saved with."
        )
    return shard


def _swap_names(engine: Any, folder: Path) -> dict[Path, str]:
    """Return this rank's saved swap files, each with its name in this process.

    DeepSpeed names them by ids that count the parameters of all models in a process. So the ids may
    differ between processes, but their order does not.
    """
    zero = engine.optimizer
    rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
    files = folder / "offloaded_tensors" / f"rank{rank:02d}"
    saved_ids = sorted(
        {file.name.removesuffix(_SUFFIX).split("-")[-1] for file in files.glob(f"*{_SUFFIX}")},
        key=_numbers,
    )
    masters = enumerate(zero.fp32_partitioned_groups_flat)
    own_ids = sorted(
        (master.ds_id for i, master in masters if zero._swappable_optimizer_subgroup(i)),
        key=_numbers,
    )
    if len(saved_ids) != len(own_ids):
        raise ValueError(
            f"{files} holds the files of {len(saved_ids)} sub-groups, {len(own_ids)} are on NVMe: "
            f"files of the checkpoint are missing."
        )
    names = dict(zip(saved_ids, own_ids, strict=True))
    found = {}
    for file in files.glob(f"*{_SUFFIX}"):
        *state, name = file.name.removesuffix(_SUFFIX).split("-")
        found[file] = "-".join([*state, names[name]]) + _SUFFIX
    return found


def _numbers(name: str) -> list[int]:
    return [int(number) for number in name.split("_")]


def _prepare_swapped(zero: Any, shard: Mapping[str, Any]) -> None:
    """Restore what the shard holds; prepare the states that DeepSpeed will read from swap files."""
    saved = shard["optimizer_state_dict"]
    state = zero.optimizer.state
    zero.optimizer_swapper.purge_state()  # drops the files of moments from before this load
    for number, master in enumerate(zero.fp32_partitioned_groups_flat):
        swapped = zero._swappable_optimizer_subgroup(number)
        if not swapped:
            master.data.copy_(shard["fp32_flat_groups"][number])
        if number not in saved["state"]:
            state.pop(master, None)
            continue
        entry = dict(saved["state"][number])
        for key in ("exp_avg", "exp_avg_sq"):
            if swapped:  # a placeholder of one element, replaced when it is swapped in
                size = int(zero.fp16_partitioned_groups_flat_numel[number])
                entry[key] = torch.empty(1, dtype=torch.float32).expand(size)
        state[master] = entry
    _restore_groups(zero.optimizer.param_groups, saved["param_groups"])


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False)
