"""LLaMA-Factory's v1 trainer with AdaBelief: a plugin, and a start that imports it first.

    torchrun --nproc-per-node 2 llamafactory_adabelief.py sft.yaml

with `optim_config: {name: adabelief, lr: 1.0e-4, betas: [0.9, 0.95], weight_decay: 0.1}` there.
"""

from __future__ import annotations

from typing import Any

from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
from torch import nn

import belief_dist


@OptimizerPlugin("adabelief").register()
def adabelief(model: nn.Module, config: dict[str, Any]) -> belief_dist.AdaBelief:
    """Return AdaBelief for what the model trains, with the options of `optim_config`."""
    options = {key: value for key, value in config.items() if key != "name"}
    trained = [named for named in model.named_parameters() if named[1].requires_grad]
    optimizer = belief_dist.AdaBelief(trained, **options)
    print(belief_dist.verify(optimizer), flush=True)
    return optimizer


if __name__ == "__main__":
    from llamafactory.v1.trainers.sft_trainer import run_sft

    run_sft()
