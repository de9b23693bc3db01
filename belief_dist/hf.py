"""A callback for the Trainer of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from belief_dist.verification import verify


class VerifyCallback(TrainerCallback):  # type: ignore[misc]  # transformers may be absent
    """Prints which optimizer trains, on the main process; raises on all ranks if it is another.

    ``Trainer(..., callbacks=[VerifyCallback()])``. The check is made when training begins, after
    Trainer, Accelerate and DeepSpeed have built, wrapped or replaced the optimizer.

    Raises:
        NotAdaBelief: See `belief_dist.verify`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Verify the optimizer that the Trainer is about to use."""
        running = verify(kwargs["optimizer"])
        if state.is_world_process_zero:
            print(running, flush=True)
