"""Notices bits of masters and states that have changed between two updates.

A parameter has a copy on every rank, and copies are compared (`step_consensus`). Its states and its
master have one owner: a bit that flips there goes into the parameters of all ranks alike, and
nobody differs. So the update itself sums up the words that it writes, and the next one those that
it reads, see `operands.Operands.sums`: both are in registers then. What it has read wrongly it has
used: the step after it raises, on all ranks, and nothing is saved meanwhile.

Sums of words add up: what updates of parts read and write is added to, or taken off, the sum of the
whole. Padding, which updates of the whole write and those of parts do not read, has a sum too.

Tensors that torch has written to since the last update, such as by a load, begin anew: every
in-place change counts a version up, and the kernels count none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from belief_dist.async_device import upload
from belief_dist.operands import WATCHED, cut
from belief_dist.sharding.bucket import BucketBuffers
from belief_dist.state_formats import is_stochastic, word_sums, wrapped

# Programs of a GPU that add to one number wait for each other, so there are many.
_GPU_SLOTS = 256


class Extent(IntEnum):
    """How much of a bucket an update has read and written."""

    SOME = 0  # some of its parameters, or none
    PARAMS = 1  # all of them, and no padding
    WHOLE = 2


class StateSums:
    """The sums of this rank's shards.

    Attributes:
        faults: (buckets, WATCHED), bool, where the masters are: what was read and had not been
            written so. It stays until `forget`.
    """

    def __init__(self, buckets: Sequence[BucketBuffers]) -> None:
        """Watch all buckets, from their next update on."""
        device = buckets[0].master.device
        shape = len(buckets), WATCHED
        slots = 1 if device.type == "cpu" else _GPU_SLOTS
        self._buckets = buckets
        self._rows = torch.zeros(len(buckets), slots, 2, WATCHED, dtype=torch.int32, device=device)
        # Where a parameter is its own master, its copies are compared, and code may change it.
        counts = [
            [b.has_master or b.remainder is not None] + [True] * (WATCHED - 1) for b in buckets
        ]
        self._counts = torch.tensor(counts, device=device)
        self._expected = torch.zeros(shape, dtype=torch.int32, device=device)
        self._padding = torch.stack(list(map(_sum_of_padding, buckets)))
        self._is_known = torch.zeros(len(buckets), 1, dtype=torch.bool, device=device)
        self._is_padding_known = torch.ones_like(self._is_known)
        self.faults = torch.zeros(shape, dtype=torch.bool, device=device)
        self._masks: dict[tuple[tuple[Extent, bool], ...], Tensor] = {}
        self._note_versions()

    def row(self, number: int) -> Tensor:
        """Return where the update of bucket `number` adds its sums."""
        return self._rows[number]

    def forget(self) -> None:
        """Take what is stored now for right, in place: replays of a CUDA graph see it, too."""
        self._is_known.zero_()  # padding is what it was: nothing but updates writes there
        self.faults.zero_()
        self._note_versions()

    def _watched(self, bucket: BucketBuffers) -> list[Tensor]:
        lower = [] if bucket.remainder is None else [bucket.remainder]
        return [*lower, *([bucket.master] if bucket.has_master else []), *bucket.states.values()]

    def _note_versions(self) -> None:
        self._versions = [[t._version for t in self._watched(each)] for each in self._buckets]

    def begin(self) -> None:
        """Begin an update."""
        before = self._versions
        self._note_versions()
        self._is_trusted = [a == b for a, b in zip(before, self._versions, strict=True)]
        self._rows.zero_()

    def end(self, extents: Mapping[int, Extent], skip: Tensor) -> None:
        """Compare what the update has read with what the last one has written.

        Args:
            extents: Of the update, by bucket; those that are not in it were not updated.
            skip: As for the update.
        """
        each = [extents.get(number, Extent.SOME) for number in range(len(self._buckets))]
        whole, params, trusted = self._mask(tuple(zip(each, self._is_trusted, strict=True)))
        read, written = wrapped(self._rows.sum(1)).unbind(1)
        known = self._is_known & trusted
        learns = params & ~self._is_padding_known & known  # what it did not read is the padding
        padding = torch.where(learns, self._expected - read, self._padding)
        padding_known = (self._is_padding_known | learns) & ~whole
        outside = torch.where(whole, torch.zeros_like(padding), padding)
        is_read = whole | (params & padding_known)
        differs = known & is_read & self._counts & (read + outside != self._expected)
        expected = torch.where(is_read, written + outside, self._expected + written - read)
        taken = ~(skip > 0)
        self.faults |= differs & taken
        # In place, for CUDA graphs.
        self._expected.copy_(torch.where(taken, expected, self._expected))
        self._is_known.copy_(torch.where(taken, known | is_read, known))
        self._padding.copy_(torch.where(taken, padding, self._padding))
        self._is_padding_known.copy_(torch.where(taken, padding_known, self._is_padding_known))
        self._note_versions()

    def _mask(self, key: tuple[tuple[Extent, bool], ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return which buckets were updated as a whole, which by parts, and which are trusted."""
        found = self._masks.get(key)
        if found is None:
            flags = [
                [extent == Extent.WHOLE, extent == Extent.PARAMS, is_trusted]
                for extent, is_trusted in key
            ]
            words = upload([int(x) for row in flags for x in row], torch.int64, self.faults.device)
            found = words.view(-1, 3).bool()
            self._masks = {key: found}  # almost always the same
        whole, params, trusted = found.split(1, dim=1)
        return whole, params, trusted

    def compare_now(self) -> None:
        """Compare what is stored at this moment, between two steps; reads all of it."""
        versions = self._versions
        self._note_versions()
        for number, bucket in enumerate(self._buckets):
            if versions[number] == self._versions[number] and bool(self._is_known[number]):
                now = word_sums(bucket.operands(bucket.grad_shard))
                self.faults[number] |= (now != self._expected[number]) & self._counts[number]
        self._versions = versions


def _sum_of_padding(bucket: BucketBuffers) -> Tensor:
    """Return the sums of what is stored between a shard's parameters: (WATCHED,), int32."""
    whole = bucket.operands(bucket.grad_shard)
    total = torch.zeros(WATCHED, dtype=torch.int64, device=bucket.master.device)
    # What is rounded stochastically is updated by parts, and its padding is 0 for ever.
    if not is_stochastic(whole.exp_avg.dtype):
        for start, stop in bucket.gaps_of_shard():
            total += word_sums(cut(whole, start, stop))
    return wrapped(total)
