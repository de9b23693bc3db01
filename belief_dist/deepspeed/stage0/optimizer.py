"""The optimizer's side: what DeepSpeed's engine asks of the optimizers that it drives."""

from __future__ import annotations

import uuid
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from belief_dist import checkpoint
from belief_dist.checkpoint.errors import run_together
from belief_dist.deepspeed.stage0.engine import ShardedEngine
from belief_dist.sharded import ShardedAdaBelief

# The folder of the shards in that of a DeepSpeed checkpoint, and their entry in its own file.
FOLDER = "belief_dist"


class EngineOptimizer(ShardedAdaBelief):
    """A `ShardedAdaBelief` that a DeepSpeed engine drives; `attach` makes it one.

    Attributes:
        overflow: Whether the last step was skipped because a gradient was not finite. The engine
            then counts it as skipped, and does not step its learning rate.
    """

    overflow: bool = False
    _saved_as: str | None = None
    _loaded_as: str | None = None

    def attach(self, engine: ShardedEngine, max_grad_norm: float | None) -> None:
        """Belong to `engine` from now on; called by all ranks.

        Args:
            engine: Its model's parameters are in the dtype and place in which they are trained.
            max_grad_norm: The engine's gradient clipping; None for none.
        """
        first_time = not hasattr(self, "_engine")
        self._engine = weakref.ref(engine)
        self._max_grad_norm = max_grad_norm
        names = {id(param): name for name, param in engine.module.named_parameters()}
        for group in self.param_groups:
            # Under which a checkpoint holds them, and errors name them.
            group["param_names"] = [names[id(param)] for param in group["params"]]
        groups = {spec.group for spec in self._layout.params}
        has_gaps = len(groups) <= max(groups, default=-1)
        # The engine has cast and broadcast the model since, or has dropped empty param groups.
        if engine.client_optimizer is self or has_gaps:
            self._rebuild()
        if first_time:
            self.register_step_pre_hook(_before_step)
            self.register_step_post_hook(_after_step)

    def _rebuild(self) -> None:
        """Move the parameters as they are now into new buffers; states begin anew."""
        self._guard.settle_all()
        self._gradients.close()
        self._buckets = []
        self.state.clear()
        self._check_params()
        self._built = False
        self._build()
        self._built = True

    def _is_last_backward(self) -> bool:
        engine = self._engine()
        if engine is None:
            return True
        boundary: bool = engine.is_gradient_accumulation_boundary()
        return boundary and not engine.inside_no_sync_ctxt

    def _check_caller(self) -> None:
        """Know the engine that calls."""

    # - What the engine reports

    @property
    def _global_grad_norm(self) -> Tensor:
        return self.grad_norm

    @property
    def cur_scale(self) -> float:
        """The loss scale of the next backward pass."""
        scaler = self._scaler()
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _scaler(self) -> torch.amp.GradScaler | None:
        engine = self._engine()
        return None if engine is None else engine.torch_autocast_z0_gradscaler

    # - Checkpoints

    def save(self, folder: Path, step: int) -> None:
        """Write the shards of all ranks into `folder`, that of a DeepSpeed checkpoint.

        Until `end_of_save`, `state_dict` is what DeepSpeed shall write beside them.

        Raises:
            CheckpointError: On every rank: it cannot be written.
        """
        name = self.links.exchange(uuid.uuid4().hex)[0]
        checkpoint.save(folder / FOLDER, step, optimizer=self, extra={"saved_as": name}, keep=1)
        self._saved_as = name

    def end_of_save(self) -> None:
        """Let `state_dict` be this rank's shard again."""
        self._saved_as = None

    def load(self, folder: Path) -> None:
        """Read this rank's shard from `folder`, that of a DeepSpeed checkpoint of any world size.

        Raises:
            CheckpointError: On every rank, before anything is changed.
        """
        run_together(self.links, f"cannot load from {folder}", lambda: _check_folder(folder))
        loaded = checkpoint.load(folder / FOLDER, optimizer=self)
        self._loaded_as = loaded.extra["saved_as"]

    def end_of_load(self, with_states: bool) -> None:
        """Bring parameters and masters together after DeepSpeed has loaded the model's weights.

        Args:
            with_states: Take the parameters from the masters, and not the other way round.
        """
        if with_states:
            self.take_masters(skipped_steps=self._skipped, seed=self._seed)
        else:
            self.settle()
            for bucket in self._buckets:
                bucket.refresh_master()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's shard; while the engine saves, what binds its file to the shards.

        DeepSpeed writes the first rank's alone, and gives it to every rank when it loads.
        """
        if self._saved_as is None:
            return super().state_dict()
        scaler = self._scaler()
        scale = None if scaler is None else scaler.state_dict()
        return {FOLDER: {"saved_as": self._saved_as, "scaler": scale}}

    def load_state_dict(
        self, state_dict: dict[str, Any], load_optimizer_states: bool = True
    ) -> None:
        """Load this rank's shard, or compare what the engine has saved with the shards read before.

        Raises:
            ValueError: On every rank: the two are of different saves, or as for `ShardedAdaBelief`.
        """
        saved = state_dict.get(FOLDER)
        if saved is None:
            super().load_state_dict(state_dict)
            return
        if saved["saved_as"] != self._loaded_as:
            raise ValueError(
                f"DeepSpeed's file and the folder {FOLDER!r} beside it are of different saves: one "
                f"was written over the other halfway. Load another checkpoint, or pass "
                f"load_module_only=True to take DeepSpeed's weights alone."
            )
        scaler = self._scaler()
        if scaler is not None and saved["scaler"] is not None:
            scaler.load_state_dict(saved["scaler"])


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    optimizer._skipped_before = optimizer.skipped_steps


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    optimizer.overflow = optimizer.skipped_steps > optimizer._skipped_before


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError("there is no such checkpoint.")
    if not (folder / FOLDER).is_dir():
        raise ValueError(
            f"it has no folder {FOLDER!r}, so it was saved by an engine without ShardedAdaBelief; "
            f"pass load_optimizer_states=False to begin with its weights and new states."
        )
