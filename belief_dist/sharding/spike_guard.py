"""Leaves out steps whose gradient is far larger than those of the steps before.

A *spike* is a step whose norm is more than `factor` times the median of the norms of the last
`WINDOW` steps that were taken. What is compared is the exact norm of all ranks' mean gradient, the
same number on every rank, so that all decide alike and nothing more is sent.

Nothing is a spike before `FEWEST` steps were taken. After `MOST_IN_A_ROW` spikes without a taken
step between them the next one is taken, whatever its norm, and the history begins anew with it: the
gradients have a new level, and a guard that skipped for ever would end the training silently.

All of it is computed where the norm is, from memory that stays in its place: the host does not wait
for it, and a CUDA graph can replay it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from belief_dist.async_device import LateRead, is_capturing
from belief_dist.sharding.step_consensus import Verdict

WINDOW = 128
FEWEST = 32
MOST_IN_A_ROW = 8


class SpikeGuard:
    """Knows the norms of the last steps, and judges the next one by them."""

    def __init__(self, factor: float | None, device: torch.device) -> None:
        """Begin without a history.

        Args:
            factor: So many times the median is not yet a spike; None judges nothing.
            device: Of the norms and verdicts.
        """
        self._factor = factor
        # How many spikes have come in a row; then norms, the newest first, infinite for none.
        self._nothing = torch.full((1 + WINDOW,), math.inf, dtype=torch.float64, device=device)
        self._nothing[:1].zero_()
        self._history = self._nothing.clone()
        self._last: tuple[LateRead, LateRead] | None = None

    def judge(self, norm: Tensor, verdict: Tensor) -> Tensor:
        """Return the verdict about a step, and note its norm if that is to be taken.

        Args:
            norm: One element, float64: the L2 norm of the mean gradient, before it is clipped.
            verdict: One element, int64: what is known without it.

        Returns:
            `Verdict.SPIKE` in the place of `Verdict.UPDATE`, if it is one; else `verdict`.
        """
        if self._factor is None:
            return verdict
        in_a_row, norms = self._history[0], self._history[1:]
        count = (norms < math.inf).sum()
        median = norms.sort().values.gather(0, (count >> 1).view(1)).view(())
        # A level of zero, of steps without a gradient, says nothing about those that have one.
        knows = (count >= FEWEST) & (median > 0)
        limit = torch.where(knows, self._factor * median, math.inf)
        is_high, updates = norm > limit, verdict == Verdict.UPDATE
        is_spike = updates & is_high & (in_a_row < MOST_IN_A_ROW)
        is_taken = updates ^ is_spike
        older = torch.where(is_high, self._nothing[2:], norms[:-1])
        noted = torch.cat([self._nothing[:1], norm.view(1), older])
        self._history.copy_(torch.where(is_taken, noted, self._history))
        self._history[0].add_(is_spike)
        if not is_capturing(norm.device):
            # The bits of a float64 that is not negative are those of such an integer.
            self._last = LateRead(norm.view(torch.int64)), LateRead(limit.view(torch.int64))
        return torch.where(is_spike, Verdict.SPIKE, verdict)

    def describe(self) -> str:
        """Return why the last step that no graph has taken was a spike, once that is known."""
        assert self._last is not None and self._factor is not None
        norm, limit = (struct.unpack("d", struct.pack("q", each.get()))[0] for each in self._last)
        return (
            f"the gradient's norm is {norm:.4g}, and more than {limit:.4g}, which is "
            f"spike_guard={self._factor:g} times the median of the steps before"
        )

    def words(self) -> list[Tensor]:
        """Return what must be equal on all ranks: one element, float64, or nothing."""
        if self._factor is None:
            return []
        return [self._history.view(torch.int64).sum().view(torch.float64)]

    def history(self) -> list[float]:
        """Return what `restore` takes; waits for the device.

        How many spikes have come in a row, and then norms, the newest first. Empty if there are
        none.
        """
        if self._factor is None:
            return []
        known = [each for each in self._history.tolist() if each < math.inf]
        return known if known != [0.0] else []

    def restore(self, history: Sequence[float]) -> None:
        """Go on from what `history` has returned, of any number of ranks."""
        self._history.copy_(self._nothing)
        if self._factor is not None and history:
            known = torch.tensor(history[: 1 + WINDOW], dtype=torch.float64)
            self._history[: len(known)].copy_(known)
