"""The optimizers that are compared, and the settings that the paper of AdaBelief has for them.

AdaBelief adds eps to s at every step, so that its denominator never falls below
sqrt(eps / (1 - beta2)). MATCHED is the eps of Adam which does the same as AdaBelief's 1e-8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from belief_dist import AdaBelief, ShardedAdaBelief
from examples.evidence.eadam import EAdam
from examples.evidence.study import Contender

MATCHED = math.sqrt(1e-8 / (1 - 0.999))

RULES: dict[str, Callable[..., Optimizer]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RAdam": torch.optim.RAdam,
    "RMSprop": torch.optim.RMSprop,
    "EAdam": EAdam,
    "AdaBelief": AdaBelief,
    "ShardedAdaBelief": ShardedAdaBelief,
}


def build(contender: Contender, params: Iterable[Any], lr: float) -> Optimizer:
    """Return the contender's optimizer."""
    return RULES[contender.rule](params, lr=lr, **contender.options)
