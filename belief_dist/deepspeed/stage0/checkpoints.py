"""Checkpoints of an engine that drives a ShardedAdaBelief: shards of all ranks beside its files.

The optimizer's shards lie in a folder of their own inside DeepSpeed's, and every save has a name
that both hold, so that files of two saves are never taken for one.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from belief_dist import checkpoint
from belief_dist.checkpoint.errors import run_together
from belief_dist.deepspeed.stage0.driver import EngineDriver
from belief_dist.deepspeed.wrapping import Wrapper
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.state_dict import answered_by

# The folder of the shards in that of a DeepSpeed checkpoint, and their entry in its own file.
FOLDER = "belief_dist"


def save_checkpoint(
    original: Wrapper,
    engine: Any,
    save_dir: str,
    tag: str | int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Save as DeepSpeed does, with the shards of all ranks in a folder beside its files.

    The shards are written first: DeepSpeed's `latest` names a checkpoint that has both.

    Raises:
        CheckpointError: On every rank: the shards cannot be written.
    """
    if not save_dir:  # DeepSpeed says so
        return original(engine, save_dir, tag, *args, **kwargs)
    optimizer, driver = _driven_by(engine)
    if tag is None:
        tag = f"global_step{engine.global_steps}"
    name = optimizer.comm.exchange(uuid.uuid4().hex)[0]
    checkpoint.save(
        Path(save_dir, str(tag), FOLDER),
        engine.global_steps,
        optimizer=optimizer,
        extra={"saved_as": name},
        keep=1,
    )
    scale = None if driver.scaler is None else driver.scaler.state_dict()
    # DeepSpeed writes the first rank's alone, and gives it to every rank when it loads.
    written = {FOLDER: {"saved_as": name, "scaler": scale}}
    with answered_by(optimizer, state_dict=lambda: written):
        return original(engine, save_dir, tag, *args, **kwargs)


def load_checkpoint(
    original: Wrapper,
    engine: Any,
    load_dir: str,
    tag: str | int | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Callable[..., Any] | None = None,
) -> Any:
    """Load what any number of ranks has saved; arguments and result are DeepSpeed's.

    With optimizer states, the master weights saved with them win over the model's own. Without
    them the loaded weights become the masters.

    Raises:
        CheckpointError: On every rank, before anything is changed: the shards are missing,
            damaged, or of another model.
        ValueError: On every rank: DeepSpeed's files there are of another save than the shards.
    """
    optimizer, driver = _driven_by(engine)
    if tag is None:
        latest = Path(load_dir, "latest")
        tag = latest.read_text().strip() if latest.is_file() else None
    wants_states = load_optimizer_states and not load_module_only
    if wants_states and tag is not None:
        folder = Path(load_dir, str(tag))
        run_together(optimizer.comm, f"cannot load from {folder}", lambda: _check_folder(folder))
        loaded = checkpoint.load(folder / FOLDER, optimizer=optimizer)
        driver.loaded_as = loaded.extra["saved_as"]

    def load_state_dict(state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        saved = state_dict.get(FOLDER)
        if saved is None:
            type(optimizer).load_state_dict(optimizer, state_dict)
            return
        if saved["saved_as"] != driver.loaded_as:
            raise ValueError(
                f"DeepSpeed's file and the folder {FOLDER!r} beside it are of different saves: one "
                f"was written over the other halfway. Load another checkpoint, or pass "
                f"load_module_only=True to take DeepSpeed's weights alone."
            )
        if driver.scaler is not None and saved["scaler"] is not None:
            driver.scaler.load_state_dict(saved["scaler"])

    with answered_by(optimizer, load_state_dict=load_state_dict):
        path, client_state = original(
            engine,
            load_dir,
            tag=None if tag is None else str(tag),
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )
    if path is not None and wants_states:
        optimizer.sync_params_from_masters(
            skipped_steps=optimizer.skipped_steps,
            seed=optimizer.options.seed,
            spike_history=optimizer.spike_history,
        )
    elif path is not None:
        optimizer.refresh_masters()
    return path, client_state


def _driven_by(engine: Any) -> tuple[ShardedAdaBelief, EngineDriver]:
    optimizer: ShardedAdaBelief = engine.optimizer
    assert isinstance(optimizer.driver, EngineDriver)
    return optimizer, optimizer.driver


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError("there is no such checkpoint.")
    if not (folder / FOLDER).is_dir():
        raise ValueError(
            f"it has no folder {FOLDER!r}, so it was saved by an engine without ShardedAdaBelief; "
            f"pass load_optimizer_states=False to begin with its weights and new states."
        )
