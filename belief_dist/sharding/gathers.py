"""The way of updated parameters from their shards to all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from belief_dist.phases import Phases
from belief_dist.sharding.bucket import BucketBuffers
from belief_dist.sharding.collectives import start_gather
from belief_dist.sharding.dtensor import local_part
from belief_dist.sharding.layout import Layout
from belief_dist.sharding.rank_sets import RankSet
from belief_dist.sharding.read_guard import ReadGuard


class Gathers:
    """Gathers the buckets of one optimizer; the guard waits for them."""

    def __init__(
        self,
        params: Sequence[Tensor],
        layout: Layout,
        buckets: Sequence[BucketBuffers],
        sets: Sequence[RankSet],
        guard: ReadGuard,
        phases: Phases,
    ) -> None:
        """Serve `buckets`.

        Args:
            params: All parameters.
            layout: Which of them each bucket has.
            buckets: Whose flat parameters are gathered.
            sets: The ranks that share buckets, by `Bucket.ranks`.
            guard: Waits before parameters are read that are on the way.
            phases: Of the optimizer.
        """
        self._buckets = buckets
        self._all = [each.comm for each in sets]
        self._comms = [self._all[plan.ranks] for plan in layout.buckets]
        self._guard, self._phases = guard, phases
        # What must not be read while a bucket's gather is on the way: its parameters, and the parts
        # of DTensors, which `to_local` reads.
        self._read = [[params[slot.param] for slot in plan.slots] for plan in layout.buckets]
        for tensors in self._read:
            tensors += [part for p in list(tensors) if (part := local_part(p)) is not p]

    def open(self, order: Sequence[int]) -> None:
        """Let the other ranks write to buckets whose gathers are started next, in this order."""
        for comm in self._all:
            own = [number for number in order if self._comms[number] is comm]
            comm.open_gathers([self._buckets[number].flat_param for number in own])

    def start(self, number: int) -> None:
        """Start to gather bucket `number`, unless this rank has all of it."""
        comm = self._comms[number]
        if comm.num_shards > 1:
            with self._phases("gather"):
                gather = start_gather(comm, self._buckets[number].flat_param, number)
            self._guard.expect(self._read[number], gather.wait, gather.has_ended)

    def close(self, *, overlap: bool) -> None:
        """Notice that all were started; wait for them if they do not `overlap` what follows."""
        with self._phases("gather"):
            for comm in self._all:
                comm.close_gathers()
            if overlap:
                self._guard.arm()
        if not overlap:
            self._guard.wait_all()
