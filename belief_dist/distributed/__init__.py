"""Initialize torch.distributed under any launcher: `belief_dist.distributed.init()`."""

from belief_dist.distributed.errors import LaunchError
from belief_dist.distributed.init import TIMEOUT, World, init

__all__ = ["TIMEOUT", "LaunchError", "World", "init"]
