"""torchtitan's container of optimizers, with AdaBelief among those that it builds.

In a config function of torchtitan: `Trainer.Config(..., optimizer=adabelief(lr=8e-4))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from belief_dist import AdaBelief


class AdaBeliefContainer(OptimizersContainer):
    """Builds AdaBelief too: torchtitan's own list of names is closed."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """That of torchtitan, whose build() gives the class around it."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name == "AdaBelief":
            return AdaBelief
        return OptimizersContainer._resolve_optimizer_factory(name)


def adabelief(lr: float = 8e-4, **options: Any) -> AdaBeliefContainer.Config:
    """Return what torchtitan's `default_adamw` does, for AdaBelief and without Adam's eps."""
    options = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.1, **options}
    everything = ParamGroupConfig(
        pattern=r".*", optimizer_name="AdaBelief", optimizer_kwargs=options
    )
    return AdaBeliefContainer.Config(param_groups=[everything])
