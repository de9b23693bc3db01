"""Steps that a CUDA graph takes: counted on the device, and read by the host on demand.

The host runs `step` once, while the graph records it, and knows nothing of its replays. So a
captured step reads its number from the device: the count that the host had when it captured, plus
the steps that were taken since, on the device. Its verdict stays there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from belief_dist import async_device
from belief_dist.sharding.step_consensus import Verdict


class News(NamedTuple):
    """What replays have done since the host last asked."""

    taken: int
    skipped: int
    fault: Verdict  # the gravest: ranks came apart, or a gradient must not be taken; or UPDATE


class GraphCounts:
    """Counters on the device, which captured steps go on counting; and what the host knows.

    Attributes:
        are_used: Whether a step was captured. Until then nothing is counted.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin at zero; while no graph is captured."""
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # as in News
        self._known = [0, 0]
        self.are_used = False

    def captures(self, used: Sequence[bool]) -> bool:
        """Return whether a CUDA graph captures the step under way.

        Args:
            used: Which parameters have a gradient in it.

        Raises:
            RuntimeError: One does, and some parameters have none.
        """
        if not async_device.is_capturing(self._counts.device):
            return False
        if not all(used):
            raise RuntimeError(
                "a CUDA graph can capture a step only if every parameter has a gradient in it: "
                "freeze those that have none before you build the optimizer."
            )
        return True

    def step_number(self, count: int) -> Tensor:
        """Return the number of the step that is captured, one element, on the device.

        Args:
            count: The steps that were taken so far, as the host counts.
        """
        self.are_used = True
        return self._counts[0] + (count + 1 - self._known[0])

    def count(self, verdict: Tensor) -> None:
        """Count the captured step by its verdict, at every replay."""
        taken = verdict == Verdict.UPDATE
        fault = torch.where(verdict >= Verdict.STEPS_DIFFER, verdict, 0)
        skipped = ~taken & (fault == 0)
        self._counts[:2].add_(torch.stack([taken, skipped]))  # `+=` would copy it once more
        torch.maximum(self._counts[2], fault, out=self._counts[2])

    def count_outside(self, verdict: Tensor) -> None:
        """Count a step that no graph took, so that the next replay goes on behind it."""
        if self.are_used:
            self._counts[0].add_(verdict == Verdict.UPDATE)
            self._known[0] += 1  # the host counts it itself, and counts it back

    def take_back(self) -> None:
        """Note that the last step outside was not taken."""
        if self.are_used:
            self._known[0] -= 1

    def read(self) -> News:
        """Return what is new; waits for the device."""
        if not self.are_used:
            return News(0, 0, Verdict.UPDATE)
        taken, skipped, fault = self._counts.tolist()
        news = News(taken - self._known[0], skipped - self._known[1], Verdict(fault))
        self._known = [taken, skipped]
        self._counts[2].zero_()
        return news
