"""belief_dist: ZeRO-style sharded AdaBelief for PyTorch."""

from typing import Any

import _belief_dist_autoload
from belief_dist import distributed
from belief_dist.deepspeed.patches import on_engine
from belief_dist.kernels import backends
from belief_dist.optimizer import AdaBelief
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.verification import NotAdaBelief, Running, verify
from belief_dist.version import __version__

__all__ = [
    "AdaBelief",
    "NotAdaBelief",
    "Running",
    "ShardedAdaBelief",
    "__version__",
    "backends",
    "distributed",
    "verify",
]

# Also without the installed entry point, `import belief_dist` makes the names known to torch.optim.
_belief_dist_autoload.register()


def _enter_engine(engine: Any, optimizer: ShardedAdaBelief) -> None:
    from belief_dist.deepspeed.stage0.attach import enter  # imports DeepSpeed

    enter(engine, optimizer)


on_engine(ShardedAdaBelief, _enter_engine)
