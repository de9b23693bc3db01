"""An Axolotl plugin that trains with AdaBelief.

In the YAML: `plugins: [axolotl_adabelief.AdaBeliefPlugin]`, with this folder on PYTHONPATH.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from belief_dist import AdaBelief
from belief_dist.hf import VerifyCallback


class AdaBeliefPlugin(BasePlugin):
    """Gives the trainer AdaBelief, with learning rate, betas and weight decay of the YAML."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Name the class; the trainer builds it, with Axolotl's param groups."""
        # Not by create_optimizer(): Axolotl declares that hook and never calls it.
        args = trainer.args
        betas = (args.adam_beta1, args.adam_beta2)
        trainer.optimizer_cls_and_kwargs = (AdaBelief, {"lr": args.learning_rate, "betas": betas})
        trainer.add_callback(VerifyCallback())
