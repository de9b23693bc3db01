"""belief_dist: ZeRO-style sharded AdaBelief for PyTorch."""

import _belief_dist_autoload
from belief_dist.kernels import backends
from belief_dist.optimizer import AdaBelief
from belief_dist.running import NotAdaBelief, Running, verify
from belief_dist.sharded import ShardedAdaBelief

__version__ = "0.1.0"
__all__ = [
    "AdaBelief",
    "NotAdaBelief",
    "Running",
    "ShardedAdaBelief",
    "__version__",
    "backends",
    "verify",
]

# Also without the installed entry point, `import belief_dist` makes the name known to torch.optim.
_belief_dist_autoload.register()
