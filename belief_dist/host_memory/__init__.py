"""Memory that the ranks of one host share: without names, and gone with the last process."""

from belief_dist.host_memory.arena import Arena
from belief_dist.host_memory.team import Team, meet

__all__ = ["Arena", "Team", "meet"]
