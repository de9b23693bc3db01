"""Lets the name `torch.optim.AdaBelief` resolve in any process where belief_dist is installed.

DeepSpeed, Hydra configs and others look an optimizer up by `getattr(torch.optim, name)`. torch
calls `register` at the end of `import torch` (entry point group `torch.backends`), so that such a
lookup finds AdaBelief, or ShardedAdaBelief, although the training script never imports belief_dist.

An exception here would break `import torch` in the whole environment, and an import of belief_dist
would be circular. So this module imports nothing but sys, and lives outside the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

# DeepSpeed lower-cases only its own optimizers' names, so users expect any case to work.
_NAMES = {name.lower(): name for name in ("AdaBelief", "ShardedAdaBelief")}


def register() -> None:
    """Give `torch.optim` our optimizers as lazy attributes in any letter case; may be repeated.

    What `torch.optim` itself has under such a name wins, in any letter case. A module
    `__getattr__` that is already there keeps answering for every other name.
    """
    try:
        _install(vars(sys.modules["torch.optim"]))
    except Exception:
        pass  # Better no lazy name than an environment without torch.


def _install(namespace: dict[str, Any]) -> None:
    """Chain a `__getattr__` in front of that of the module with this namespace."""
    previous: Callable[[str], Any] | None = namespace.get("__getattr__")
    if hasattr(previous, "serves_belief_dist"):
        return

    def __getattr__(name: str) -> Any:
        known = _NAMES.get(name.lower())
        if known in namespace:
            return namespace[known]
        if known is not None:
            import belief_dist

            return getattr(belief_dist, known)
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module 'torch.optim' has no attribute {name!r}")

    __getattr__.serves_belief_dist = True  # type: ignore[attr-defined]
    namespace["__getattr__"] = __getattr__
