"""belief_dist: ZeRO-style sharded AdaBelief for PyTorch."""

import _belief_dist_autoload
from belief_dist import distributed, observers, replacement_warning
from belief_dist.deepspeed import patches as deepspeed_patches
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

# The optimizers know no adapter; this is the only place where adapters come to know the optimizers.
observers.on_built += [deepspeed_patches.observe_built, replacement_warning.warn_if_replaced]
observers.on_first_step += [deepspeed_patches.observe_first_step]
