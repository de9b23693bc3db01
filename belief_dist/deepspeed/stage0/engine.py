"""The engine's side: what DeepSpeed would do once more is left out, what it lacks is added."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspeed.runtime.engine import DeepSpeedEngine

if TYPE_CHECKING:
    from belief_dist.deepspeed.stage0.optimizer import EngineOptimizer


class ShardedEngine(DeepSpeedEngine):  # type: ignore[misc]  # DeepSpeed carries no types
    """A `DeepSpeedEngine` at ZeRO stage 0 whose optimizer is a `ShardedAdaBelief`."""

    optimizer: EngineOptimizer

    def allreduce_gradients(self, bucket_size: int = 0) -> None:
        """Do nothing: the optimizer's hooks have started all reductions in backward."""

    def clip_fp32_gradients(self) -> None:
        """Do nothing: the optimizer clips the mean gradient in its update."""

    def zero_grad(self) -> None:
        """Forget all gradients of the model, what has been reduced of them included."""
        self.optimizer.zero_grad()
        super().zero_grad()

    def save_checkpoint(
        self, save_dir: str, tag: str | int | None = None, *args: Any, **kwargs: Any
    ) -> bool:
        """Save as DeepSpeed does, with the shards of all ranks in a folder beside its files.

        The shards are written first: DeepSpeed's `latest` names a checkpoint that has both.

        Raises:
            CheckpointError: On every rank: the shards cannot be written.
        """
        if tag is None:
            tag = f"global_step{self.global_steps}"
        if save_dir:  # else DeepSpeed says so
            self.optimizer.save(Path(save_dir, str(tag)), self.global_steps)
        try:
            saved: bool = super().save_checkpoint(save_dir, tag, *args, **kwargs)
        finally:
            self.optimizer.end_of_save()
        return saved

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load what any number of ranks has saved; arguments and result are DeepSpeed's.

        With optimizer states, the master weights saved with them win over the model's own. Without
        them the loaded weights become the masters.

        Raises:
            CheckpointError: On every rank, before anything is changed: the shards are missing,
                damaged, or of another model.
            ValueError: On every rank: DeepSpeed's files there are of another save than the shards.
        """
        if tag is None:
            latest = Path(load_dir, "latest")
            tag = latest.read_text().strip() if latest.is_file() else None
        wants_states = load_optimizer_states and not load_module_only
        if wants_states and tag is not None:
            self.optimizer.load(Path(load_dir, str(tag)))
        path, client_state = super().load_checkpoint(
            load_dir,
            tag=None if tag is None else str(tag),
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )
        if path is not None:
            self.optimizer.end_of_load(wants_states)
        return path, client_state
