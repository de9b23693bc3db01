"""For the Trainer of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from belief_dist.verification import verify


class VerifyCallback(TrainerCallback):  # type: ignore[misc]  # transformers may be absent
    """Says on the main process which optimizer trains; stops all ranks if it is not AdaBelief.

    ``Trainer(..., callbacks=[VerifyCallback()])``. It looks when training begins, after the
    Trainer, Accelerate and DeepSpeed have built, wrapped or replaced the optimizer.

    Raises:
        NotAdaBelief: See `belief_dist.verify`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the optimizer that the Trainer is about to use."""
        running = verify(kwargs["optimizer"])
        if state.is_world_process_zero:
            print(running, flush=True)
