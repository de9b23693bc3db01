"""Checkpoints that any number of ranks writes, and any number of ranks reads.

They are checkpoints of `torch.distributed.checkpoint` (DCP): its tools read them.
"""

from belief_dist.checkpoint.async_save import BackgroundSaver
from belief_dist.checkpoint.errors import CheckpointError
from belief_dist.checkpoint.loading import Loaded, load, verify
from belief_dist.checkpoint.saving import Saved, contents, save
from belief_dist.checkpoint.torch_api import logical_states

__all__ = [
    "BackgroundSaver",
    "CheckpointError",
    "Loaded",
    "Saved",
    "contents",
    "load",
    "logical_states",
    "save",
    "verify",
]
