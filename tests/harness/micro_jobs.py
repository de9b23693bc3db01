"""A small training with numbered micro-batches, as a user writes it, for any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, TensorDataset

from belief_dist import ShardedAdaBelief, checkpoint
from belief_dist.data import MicroBatchSampler, seeded
from tests.harness.models import HYPER
from tests.harness.reference import collect

STEPS = 20
SEED = 5
STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Job:
    """What is trained, and how; the number of ranks is no part of it.

    Attributes:
        micro_batches: Of a step.
        options: Of the optimizer.
        dtype: Of the model.
        scaled: With a GradScaler, and an infinite loss in two steps.
        mesh: On a mesh of two rows, or of one for a single rank.
    """

    micro_batches: int
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    scaled: bool = False
    mesh: bool = False

    @property
    def name(self) -> str:
        """A name that is one for each job."""
        more = [f"{key}={value}" for key, value in self.options.items()]
        more += ["scaled"] * self.scaled + ["mesh"] * self.mesh
        return ", ".join([f"V={self.micro_batches}", str(self.dtype).split(".")[1], *more])


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(53, 6, generator=generator)
    # Of many magnitudes, so that the order of a sum shows.
    return TensorDataset(inputs, inputs.sum(1, keepdim=True) * 10 ** inputs[:, :1])


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Linear(6, 17), nn.GELU(), nn.Dropout(0.3), nn.Linear(17, 9), nn.Linear(9, 1)]
    return nn.Sequential(*layers).to(dtype)


def loss_of(model: nn.Module, batch: list[Tensor], dtype: torch.dtype) -> Tensor:
    inputs, targets = (each.to(dtype) for each in batch)
    return (model(inputs) - targets).square().mean()


def sampler_of(micro_batches: int) -> MicroBatchSampler:
    """Return one whose epochs end in a step of smaller micro-batches, or of larger ones."""
    size = 2 if micro_batches < 12 else 4
    return MicroBatchSampler(dataset(), size, micro_batches, seed=2, drop_last=False)


class Training:
    """One rank of a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = model_of(job.dtype)
        ranks = dist.get_world_size()
        rows = min(2, ranks)
        mesh = init_device_mesh("cpu", (rows, ranks // rows)) if job.mesh else None
        self.optimizer = ShardedAdaBelief(
            self.model.named_parameters(),
            micro_batches=job.micro_batches,
            bucket_bytes=600,
            process_group=mesh,
            **{**HYPER, **job.options},
        )
        self.sampler = sampler_of(job.micro_batches)
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**10, growth_interval=3, enabled=job.scaled
        )
        self.steps = 0
        self.norms: list[float] = []

    def train(self, until: int) -> None:
        """Train up to a number of steps, over as many epochs as it takes."""
        loader = DataLoader(dataset(), batch_sampler=self.sampler)
        while self.steps < until:
            self.sampler.set_epoch(self.sampler.epoch)
            for step, micro_batches in self.sampler.steps(loader):
                assert step == self.steps
                self.optimizer.zero_grad()
                for k, batch in micro_batches:
                    with seeded(SEED, step, k):
                        loss = loss_of(self.model, batch, self.job.dtype)
                        if self.job.scaled and step in (4, 11) and k == self.job.micro_batches - 1:
                            loss = loss * float("inf")
                        self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.norms.append(self.optimizer.grad_norm.item())
                self.steps += 1
                if self.steps == until:
                    return

    def save(self, folder: Path) -> None:
        extra = {"sampler": self.sampler.state_dict(), "steps": self.steps, "norms": self.norms}
        scaler = self.scaler if self.job.scaled else None
        checkpoint.save(
            folder,
            self.steps,
            model=self.model,
            optimizer=self.optimizer,
            scaler=scaler,
            extra=extra,
        )

    def load(self, folder: Path) -> None:
        scaler = self.scaler if self.job.scaled else None
        loaded = checkpoint.load(folder, model=self.model, optimizer=self.optimizer, scaler=scaler)
        assert not loaded.changes, loaded.changes
        self.sampler.load_state_dict(loaded.extra["sampler"])
        self.steps, self.norms = loaded.extra["steps"], loaded.extra["norms"]

    def result(self) -> dict[str, Any]:
        """Return what must not depend on the number of ranks; called by all."""
        optimizer = self.optimizer
        optimizer.wait_pending()
        params = list(self.model.parameters())
        found: dict[str, Any] = {
            "p": torch.cat([param.detach().flatten() for param in params]),
            "norms": torch.tensor(self.norms, dtype=torch.float64),
            "skipped": torch.tensor(optimizer.skipped_steps),
            "scale": torch.tensor(self.scaler.get_scale()),
            "steps": torch.tensor([optimizer.state[param]["step"] for param in params]),
        }
        if not self.job.mesh:  # else the rows hold copies
            for name, parts in zip(STATES, collect(optimizer, STATES), strict=True):
                found[name] = torch.cat(parts)
        if optimizer.options.keeps_averages:
            with optimizer.averaged_parameters():
                found["averages"] = torch.cat([param.detach().flatten() for param in params])
        return found


def write(folder: Path, name: str, found: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(found, folder / f"{name}.pt")
