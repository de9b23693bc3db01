"""Gathers that have not begun when somebody reads what they bring."""

from __future__ import annotations

import torch

from belief_dist import ShardedAdaBelief


class Slow:
    """Delays every gather of an optimizer until somebody waits, by withholding the start."""

    def __init__(self, optimizer: ShardedAdaBelief) -> None:
        start = optimizer.comm.start_gather

        def start_late(flat: torch.Tensor) -> object:
            handle: list[object] = []

            class Handle:
                def wait(self) -> None:
                    if not handle:
                        handle.append(start(flat))
                    handle[0].wait()

            return Handle()

        optimizer.comm.start_gather = start_late
        optimizer.comm.open_gathers = lambda flats: None  # who reads last starts first
