"""A plugin of ms-swift that trains with AdaBelief.

    swift sft ... --external_plugins swift_adabelief.py --optimizer adabelief

Learning rate, betas and weight decay are those of that command line.
"""

from __future__ import annotations

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map
from torch.optim import Optimizer

from belief_dist import AdaBelief
from belief_dist.hf import VerifyCallback


class AdaBeliefCallback(OptimizerCallback):
    """Builds AdaBelief, with learning rate, betas and weight decay of the command line."""

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Name the class; the Trainer builds it, with its own param groups."""
        args = self.args
        betas = (args.adam_beta1, args.adam_beta2)
        self.trainer.optimizer_cls_and_kwargs = (
            AdaBelief,
            {"lr": args.learning_rate, "betas": betas},
        )
        self.trainer.add_callback(VerifyCallback())
        return super().create_optimizer(model)


optimizers_map["adabelief"] = AdaBeliefCallback
