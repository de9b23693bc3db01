"""Refuses a second reduction of the gradients: DistributedDataParallel or DataParallel around us.

Both would average what the engine sums, before or while it does so, and training would go on with
neither's gradient. They are noticed at the first forward, which comes before any gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle


def fault_of(module: nn.Module) -> str | None:
    """Return what is wrong with a module around parameters of the engine, or None if nothing is."""
    if not isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return None
    return (
        f"{type(module).__name__} is around a model that ShardedAdaBelief trains, and would reduce "
        f"its gradients a second time"
    )


class OuterReducerCheck:
    """Looks at every module that is called, until `end`."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        """Look for modules around any of `params`, which the caller keeps alive."""
        self._ids = frozenset(map(id, params))
        self._hook = _add_hook(weakref.ref(self))

    def end(self) -> None:
        """Look no longer."""
        self._hook.remove()

    def check(self, module: nn.Module) -> None:
        """Refuse a module that reduces gradients of the parameters.

        Raises:
            RuntimeError: It does.
        """
        fault = fault_of(module)
        if fault is not None and any(id(param) in self._ids for param in module.parameters()):
            raise RuntimeError(
                f"{fault}: pass the bare module to the training loop (the optimizer gives all "
                f"ranks equal parameters and averages gradients itself), or use "
                f"belief_dist.AdaBelief with {type(module).__name__}."
            )


def _add_hook(owner: weakref.ref[OuterReducerCheck]) -> RemovableHandle:
    def before_forward(module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # a hook has no place in a graph
            return
        check = owner()
        if check is None:  # the optimizer has been deleted
            handle.remove()
        else:
            check.check(module)

    handle = register_module_forward_pre_hook(before_forward)
    return handle
