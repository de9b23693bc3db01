"""What a DeepSpeed engine and the ShardedAdaBelief that it drives tell each other."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from belief_dist.deepspeed.stage0.loss_scale import EngineScaler
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.driver import Driver


class EngineDriver(Driver):
    """A `DeepSpeedEngine` at ZeRO stage 0, as the optimizer sees it.

    It holds the engine and the optimizer weakly: both hold it.

    Attributes:
        overflow: Whether the last step was skipped: a gradient was not finite, or a spike. The
            engine then counts it as skipped, and does not step its learning rate.
        loaded_as: The name of the save whose shards were loaded last.
    """

    # What the engine reads of its optimizer, beside torch's interface.
    answers = ("overflow", "cur_scale", "_global_grad_norm")

    def __init__(
        self,
        engine: Any,
        optimizer: ShardedAdaBelief,
        max_grad_norm: float | None,
        scaler: EngineScaler | None,
    ) -> None:
        """Watch the steps of `optimizer` until `close`.

        Args:
            engine: Its model's parameters are in the dtype and place in which they are trained.
            optimizer: With parameters of this model.
            max_grad_norm: The engine's gradient clipping; None for none.
            scaler: The engine's, of float16.
        """
        super().__init__(max_grad_norm)
        self._engine = weakref.ref(engine)
        self.scaler = scaler
        self.overflow = False
        self.loaded_as: str | None = None
        self._global_grad_norm: Tensor = torch.zeros(())
        self._skipped_before = 0
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def drives(self, engine: Any) -> bool:
        """Return whether this is the driver of `engine`."""
        return self._engine() is engine

    def is_last_backward(self) -> bool:
        """See `Driver.is_last_backward`; the engine knows how many micro-batches make a step."""
        engine = self._engine()
        if engine is None:
            return True
        boundary: bool = engine.is_gradient_accumulation_boundary()
        return boundary and not engine.inside_no_sync_ctxt

    @property
    def cur_scale(self) -> float:
        """The loss scale of the next backward pass."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._skipped_before = optimizer.skipped_steps

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.overflow = optimizer.skipped_steps > self._skipped_before
        self._global_grad_norm = optimizer.grad_norm


def driver_of(engine: Any) -> EngineDriver | None:
    """Return the driver of an engine whose optimizer is a ShardedAdaBelief, else None."""
    optimizer = getattr(engine, "optimizer", None)
    if not isinstance(optimizer, ShardedAdaBelief):
        return None
    driver = optimizer.driver
    return driver if isinstance(driver, EngineDriver) and driver.drives(engine) else None
