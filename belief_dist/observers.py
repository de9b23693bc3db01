"""What adapters hear of an optimizer: that it was built, and that its first step begins.

The core imports no adapter. The package's `__init__` registers them here, and the optimizers call
`notify`; an exception of an observer ends the constructor or the step.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

Observer = Callable[[Optimizer], None]

on_built: list[Observer] = []  # at the end of a constructor, by both optimizers
on_first_step: list[Observer] = []  # before anything is done, by ShardedAdaBelief


def notify(observers: list[Observer], optimizer: Optimizer) -> None:
    """Call the observers in the order in which they were registered."""
    for observe in observers:
        observe(optimizer)
