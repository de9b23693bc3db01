"""Ranks of one machine that take themselves for those of several hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from belief_dist.host_memory import team
from belief_dist.sharding import process_groups


def on_hosts(hosts: str, case: Callable[[], None], kind: type) -> None:
    """Run a case with each rank on the host that its letter names; it must connect by `kind`."""
    real = team.own_place()
    made = []

    def over(*args: Any) -> Any:
        made.append(kind(*args))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "own_place", lambda: real._replace(host=hosts[dist.get_rank()]))
        patch.setattr(process_groups, kind.__name__, over)
        case()
    assert made
