"""Masters and parameters are the same numbers: whoever changes the one is followed by the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from belief_dist.sharding.bucket import BucketBuffers, own_fragment
from belief_dist.sharding.collectives import Collectives
from belief_dist.sharding.data_edits import DataEdits
from belief_dist.sharding.layout import Layout
from belief_dist.sharding.param_storage import ParamStorage


class Masters:
    """Copies between parameters and their masters where something else than a step has written.

    Attributes:
        storage: Looks whether parameters still lie in their buckets.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        layout: Layout,
        buckets: Sequence[BucketBuffers],
        comms: Sequence[Collectives],
        *,
        defers: bool,
        label: Callable[[int], str],
    ) -> None:
        """Take the parameters as they are for those of the masters.

        Args:
            params: All parameters.
            layout: Theirs.
            buckets: Theirs.
            comms: The ranks that share the masters of each bucket.
            defers: The host must not wait for the device.
            label: Names a parameter.
        """
        self._params = params
        self._layout = layout
        self._buckets = buckets
        self._comms = comms
        self.storage = ParamStorage(params, layout, buckets, label)
        self._data_edits = DataEdits(buckets, defers=defers)
        self.note()

    def note(self) -> None:
        """Take the parameters as they are now for those of the masters."""
        self.note_versions()
        self._data_edits.note()

    def note_versions(self) -> None:
        """Take in-place changes since the last look for none; the values are what they were."""
        self._versions = [param._version for param in self._params]

    def note_update(self) -> None:
        """Likewise, after an update, which writes to the flat buffers: they have other versions."""
        self._data_edits.note()

    def follow(self) -> Tensor | None:
        """Copy parameters that were changed outside the optimizer into their masters.

        Returns:
            What is left to do, see `DataEdits.take_over`.
        """
        moved = self.storage.take_over()
        # Every in-place change of a tensor counts its version up.
        versions = [param._version for param in self._params]
        pairs = enumerate(zip(self._versions, versions, strict=True))
        changed = [] if versions == self._versions else [i for i, (a, b) in pairs if a != b]
        for index in changed:
            part = own_fragment(self._layout, self._buckets, index)
            self._buckets[part.bucket].refresh_master(part.in_shard, part.in_shard + part.numel)
        self._versions = versions
        return self._data_edits.take_over(known=moved or bool(changed))

    def refresh(self) -> None:
        """Copy all parameters into their masters."""
        for bucket in self._buckets:
            bucket.refresh_master()

    def send(self) -> None:
        """Make all parameters those of the masters; called by all ranks."""
        for bucket, comm in zip(self._buckets, self._comms, strict=True):
            if bucket.low_param is not None and bucket.remainder is None:
                bucket.low_param.copy_(bucket.master)
            bucket.send_back()
            if comm.num_shards > 1:
                comm.start_gather(bucket.flat_param).wait()

    def keep_loaded(self) -> None:
        """Take masters that were written into the states for those of the parameters."""
        for bucket in self._buckets:
            bucket.refresh_upper_halves()
