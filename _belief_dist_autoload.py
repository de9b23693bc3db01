"""Lets the name `torch.optim.AdaBelief` resolve in any process where belief_dist is installed.

DeepSpeed, Hydra configs and others look an optimizer up by `getattr(torch.optim, name)`. torch
calls `register` at the end of `import torch` (entry point group `torch.backends`), so that such a
lookup finds AdaBelief although the training script never imports belief_dist.

An exception here would break `import torch` in the whole environment, and an import of belief_dist
would be circular. So this module imports nothing but sys, and lives outside the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def register() -> None:
    """Give `torch.optim` a lazy attribute `AdaBelief`, in any letter case; may be called again.

    Nothing happens if `torch.optim` has an AdaBelief of its own. A module `__getattr__` that is
    already there keeps answering for every other name.
    """
    try:
        _install(vars(sys.modules["torch.optim"]))
    except Exception:
        pass  # Better no lazy name than an environment without torch.


def _install(namespace: dict[str, Any]) -> None:
    """Chain `_lazy_getattr` in front of the `__getattr__` of the module with this namespace."""
    previous = namespace.get("__getattr__")
    if "AdaBelief" in namespace or hasattr(previous, "serves_belief_dist"):
        return
    namespace["__getattr__"] = _lazy_getattr(previous)


def _lazy_getattr(previous: Callable[[str], Any] | None) -> Callable[[str], Any]:
    """Return a module `__getattr__` that knows AdaBelief and asks `previous` for all else."""

    def __getattr__(name: str) -> Any:
        # DeepSpeed lower-cases only its own optimizers' names, so users expect any case to work.
        if name.lower() in ("adabelief", "shardedadabelief"):
            import belief_dist

            sharded = name.lower() == "shardedadabelief"
            return belief_dist.ShardedAdaBelief if sharded else belief_dist.AdaBelief
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module 'torch.optim' has no attribute {name!r}")

    __getattr__.serves_belief_dist = True  # type: ignore[attr-defined]
    return __getattr__
