"""Checkpoints that load at any world size, whatever world size saved them.

They have the format of `torch.distributed.checkpoint` (DCP), whose tools can read them.
"""

from belief_dist.checkpoint.async_save import BackgroundSaver
from belief_dist.checkpoint.errors import CheckpointError
from belief_dist.checkpoint.loading import Loaded, load, verify
from belief_dist.checkpoint.saving import Saved, contents, save
from belief_dist.checkpoint.standby import Standby
from belief_dist.checkpoint.torch_api import logical_states

__all__ = [
    "BackgroundSaver",
    "CheckpointError",
    "Loaded",
    "Saved",
    "Standby",
    "contents",
    "load",
    "logical_states",
    "save",
    "verify",
]
