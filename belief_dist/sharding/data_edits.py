"""Notices parameters that were changed through `.data`, whose masters lie elsewhere.

`param.data.clamp_()` counts no version of `param` up, and the next update would write the masters
over it. So a checksum of this rank's piece of the parameters, where masters are apart from them, is
taken after the update and compared before the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from belief_dist.kernels import checksum
from belief_dist.sharding.bucket import BucketBuffers


class DataEdits:
    """Compares the parameters of all buckets with what the last update left."""

    def __init__(self, buckets: Sequence[BucketBuffers], *, defers: bool) -> None:
        """Watch the buckets that need it.

        Args:
            buckets: Of the optimizer.
            defers: The host must not wait for the device, and so cannot copy what was changed.
        """
        self._watched = [each for each in buckets if each.has_master or each.on_host]
        self._defers = defers
        self._sums: list[Tensor] = []

    def note(self) -> None:
        """Take the parameters as they are now for those of the masters."""
        self._sums = [checksum(each.param_shard, 0) for each in self._watched]

    def take_over(self, *, known: bool) -> Tensor | None:
        """Copy what was changed into the masters.

        Args:
            known: Parameters were changed in other ways too, whose masters know of it.

        Returns:
            With `defers`, whether something was changed, which is left to do: one element, bool, on
            the device. None if nothing is left.
        """
        pairs = list(zip(self._watched, self._sums, strict=True))
        differs = [checksum(bucket.param_shard, 0) != before for bucket, before in pairs]
        if self._defers:
            return None if known or not differs else torch.stack(differs).any()
        for (bucket, _), differ in zip(pairs, differs, strict=True):
            if bool(differ):
                bucket.refresh_edited()
        return None
