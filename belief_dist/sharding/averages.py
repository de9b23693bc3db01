"""Averages of the weights take the place of the parameters for a while, and leave no trace.

The update keeps an exponential moving average of every shard (`rule`). To evaluate it, each rank
writes the average of its shard to the parameters, rounded to their dtype, and all gather, as after
a step. Only the shard that was there is kept meanwhile: the others have theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from belief_dist.sharding.collectives import start_gather
from belief_dist.sharding.engine import ShardEngine
from belief_dist.state_dict import AVERAGE


class AverageAccess:
    """The part of `ShardedAdaBelief` that serves averages of the weights."""

    _engine: ShardEngine
    _wait: Callable[[], None]

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Let the parameters be their averages inside the context; called by all ranks.

        Afterwards, or after an exception inside, they have the bits that they had, whatever was
        written to them; masters, states and gradients notice nothing. Entering and leaving gather
        the parameters once each, so that a rank which leaves waits for the others. Meanwhile this
        rank holds its shard of the parameters once more: their bytes / world_size.

        Raises:
            RuntimeError: No averages are kept, or it comes between backward and step, or inside
                another one. Inside it, backward, step, saving and loading raise.
        """
        self._check_averages()
        self._wait()
        engine = self._engine
        if engine.reducer.has_begun:
            raise RuntimeError(
                "averaged_parameters came between backward and step, when gradients are on their "
                "way; call it after step()."
            )
        storage, buckets = engine.masters.storage, engine.buckets
        with torch.no_grad():
            engine.masters.follow()
            engine.update.start_new_averages()
            kept = [bucket.param_shard.clone() for bucket in buckets]
            storage.is_lent = True
        try:
            self._write([bucket.states[AVERAGE] for bucket in buckets])
            yield
        finally:
            storage.put_back()
            self._write(kept)
            storage.is_lent = False
            engine.masters.note_versions()

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Let the averages start from the weights as they are, and forget the way so far.

        Raises:
            RuntimeError: No averages are kept.
        """
        self._check_averages()
        self._wait()
        self._engine.masters.follow()
        self._engine.update.start_averages(range(len(self._engine.params)))

    def _check_averages(self) -> None:
        if not self._engine.options.keeps_averages:
            raise RuntimeError(
                "no averages of the weights are kept; build the optimizer with ema_decay=0.999, "
                "say."
            )

    @torch.no_grad()
    def _write(self, shards: Sequence[Tensor]) -> None:
        """Write this rank's shard of every bucket to the parameters, and gather them."""
        engine = self._engine
        for number, (bucket, shard) in enumerate(zip(engine.buckets, shards, strict=True)):
            comm = engine.comms[number]
            bucket.param_shard.copy_(shard)
            if comm.num_shards > 1:
                start_gather(comm, bucket.flat_param, number).wait()
