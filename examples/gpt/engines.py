"""Two ways to train: with ShardedAdaBelief, and with DeepSpeed's engine.

Both are used alike::

    losses = engine.step(micro_batches)    # of this rank; grad_norm and lr tell about the step
    engine.save(folder); engine.load(folder)
    engine.bytes_per_rank()                # measured on the tensors that are really held
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from gpt.model import GPT, next_byte_loss
from gpt.settings import Settings

if TYPE_CHECKING:
    from belief_dist.telemetry import StepMonitor


class Engine(Protocol):
    """What the training loop needs."""

    model: torch.nn.Module
    grad_norm: float  # of the mean gradient of the last step, before clipping
    lr: float  # of the last step

    def step(self, micro_batches: list[Tensor]) -> list[Tensor]:
        """Train on this rank's micro-batches, each (n, context + 1); return the loss of each."""

    def save(self, folder: Path) -> None:
        """Write everything that continues the run into an existing folder. For all ranks."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. For all ranks."""

    def bytes_per_rank(self) -> dict[str, int]:
        """Return the bytes of parameters, gradients, masters, exp_avg and exp_avg_sq here."""


def build_engine(model: GPT, settings: Settings, device: torch.device) -> Engine:
    """Return the engine that the settings ask for."""
    schedule = lr_factor(settings.warmup, settings.steps)
    if settings.engine == "sharded":
        dtype = getattr(torch, settings.dtype)
        options = {"timeout": timedelta(seconds=settings.timeout)} | settings.optimizer
        if settings.micro_batches is not None:
            options["micro_batches"] = settings.micro_batches
        return ShardedEngine(model.to(device, dtype), schedule, options)
    return DeepSpeedEngine(model, schedule, settings)


def lr_factor(warmup: int, steps: int) -> Callable[[int], float]:
    """Return the share of the full learning rate at a step, counted from 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    return factor


class ShardedEngine:
    """Plain PyTorch and `belief_dist.ShardedAdaBelief`."""

    def __init__(
        self, model: GPT, schedule: Callable[[int], float], options: dict[str, Any]
    ) -> None:
        from belief_dist import ShardedAdaBelief

        self.model = model
        try:
            self.optimizer = ShardedAdaBelief(model.param_groups(), **options)
        except TypeError as error:
            raise ValueError(f"in the setting optimizer: {error}") from error
        self.scheduler = LambdaLR(self.optimizer, schedule)
        self.lr = 0.0
        self.monitor: StepMonitor | None = None

    def watch(self, path: Path, every: int) -> None:
        """Write what the optimizer does into a file of records; rank 0 writes its own loss."""
        from belief_dist.telemetry import StepMonitor

        self.monitor = StepMonitor(self.optimizer, path, every)

    def step(self, micro_batches: list[Tensor]) -> list[Tensor]:
        self.optimizer.zero_grad()
        losses = []
        # With numbered micro-batches, the optimizer takes the mean.
        parts = 1 if self.optimizer.options.micro_batches else len(micro_batches)
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            # Only the last backward of a step averages gradients over the ranks.
            with nullcontext() if last else self.optimizer.no_sync():
                loss = next_byte_loss(self.model(batch[:, :-1]), batch[:, 1:])
                (loss / parts).backward()
            losses.append(loss.detach())
        self.optimizer.step()
        if self.monitor is not None:  # before the scheduler sets the next learning rate
            self.monitor.log(self.scheduler.last_epoch + 1, loss=sum(losses) / max(1, len(losses)))
        self.lr = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        return losses

    @property
    def grad_norm(self) -> float:
        return float(self.optimizer.grad_norm)

    def save(self, folder: Path) -> None:
        from belief_dist import checkpoint

        step = self.scheduler.last_epoch
        extra = {"scheduler": self.scheduler.state_dict()}
        checkpoint.save(folder, step, model=self.model, optimizer=self.optimizer, extra=extra)

    def load(self, folder: Path) -> None:
        from belief_dist import checkpoint

        # Any number of ranks, whatever number has saved it.
        loaded = checkpoint.load(folder, model=self.model, optimizer=self.optimizer)
        self.scheduler.load_state_dict(loaded.extra["scheduler"])

    def bytes_per_rank(self) -> dict[str, int]:
        return self.optimizer.bytes_per_rank()


class DeepSpeedEngine:
    """DeepSpeed's own loop; belief_dist comes in by the "type" in the JSON alone."""

    def __init__(self, model: GPT, schedule: Callable[[int], float], settings: Settings) -> None:
        import deepspeed

        if not torch.accelerator.is_available():
            # An operation that training does not use, and that takes a minute to compile.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        assert settings.deepspeed_config is not None
        config = json.loads(settings.deepspeed_config.read_text())
        config |= {
            "train_batch_size": settings.batch,
            "gradient_accumulation_steps": settings.accumulate,
            "bf16": {"enabled": settings.dtype == "bfloat16"},
        }
        try:
            self.engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=model.param_groups(),
                config=config,
                lr_scheduler=lambda optimizer: LambdaLR(optimizer, schedule),
            )
        except (AssertionError, TypeError, ValueError) as error:  # many of its checks are assert
            raise ValueError(
                f"deepspeed_config {settings.deepspeed_config}: {error} "
                f"(belief-dist check {settings.deepspeed_config} tells more)"
            ) from error
        self.model = self.engine.module
        # "ShardedAdaBelief" shards at stage 0, where DeepSpeed does not.
        self._shards_itself = hasattr(self.engine.optimizer, "bytes_per_rank")
        self.lr = self.grad_norm = 0.0
        self._gradients = 0

    def step(self, micro_batches: list[Tensor]) -> list[Tensor]:
        losses = []
        for number, batch in enumerate(micro_batches, start=1):
            loss = next_byte_loss(self.engine(batch[:, :-1]), batch[:, 1:])
            self.engine.backward(loss)
            if number == len(micro_batches):
                self.lr = self.engine.get_lr()[0]
                self._gradients = max(self._gradients, self._gradient_bytes())
                if not self._tells_norm():
                    norm = torch.nn.utils.get_total_norm(self._local_gradients())
            self.engine.step()
            losses.append(loss.detach())
        if self._tells_norm():
            norm = self.engine.get_global_grad_norm()
        self.grad_norm = float(norm)
        return losses

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise ValueError(f"DeepSpeed found no checkpoint of its own in {folder}.")

    def _tells_norm(self) -> bool:
        """Return whether the engine does; at stage 0 DeepSpeed itself clips without telling it."""
        return self._shards_itself or self.engine.zero_optimization_stage() > 0

    def _local_gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _gradient_bytes(self) -> int:
        """Count gradients between backward and step, wherever this stage keeps them."""
        held = self._local_gradients()
        for averaged in getattr(self.engine.optimizer, "averaged_gradients", {}).values():
            held += averaged or []
        held += [master.grad for master in self._masters() if master.grad is not None]  # offloaded
        return nbytes(held)

    def _masters(self) -> list[Tensor]:
        """Return the float32 shards of stages 1 and 2, or those of stage 3."""
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if hasattr(self.engine.optimizer, name):
                return getattr(self.engine.optimizer, name)
        return []

    def bytes_per_rank(self) -> dict[str, int]:
        optimizer = self.engine.optimizer
        if self._shards_itself:
            held: dict[str, int] = optimizer.bytes_per_rank()
            return held
        states = self.engine.basic_optimizer.state.values()
        return {
            # At stage 3 a parameter is empty between its uses, and its shard lies beside it.
            "parameters": nbytes(getattr(p, "ds_tensor", p) for p in self.model.parameters()),
            "gradients": self._gradients,
            "masters": nbytes(self._masters()),
            "exp_avg": nbytes(state["exp_avg"] for state in states),
            "exp_avg_sq": nbytes(state["exp_avg_sq"] for state in states),
        }


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; what lies in the same memory counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
