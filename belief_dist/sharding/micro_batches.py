"""A step of numbered micro-batches: the same bits for any number of ranks.

Micro-batch k is rank k mod W's, and its backward pass is one round:

    round 0      g0     g1    ...  g(W-1)
    round 1      gW    g(W+1) ...
    last round   ...   g(V-1)             (the other ranks take part, and add nothing)

Every shard adds them in the order of k, a round after the other, each from where the one before has
ended: ``((g0 + g1) + g2) + ...``, as one process does that computes all of them. The mean is this
sum times 1/V.

How many rounds there are follows from V and W, and not from what a script does: ranks that count
otherwise would wait for each other. So a rank takes part in all of them, whatever came, and who has
miscounted says so in the step's message.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from belief_dist.engine_options import EngineOptions
from belief_dist.sharding.grad_reducer import GradReducer
from belief_dist.sharding.sharded_grad import ShardedGrad
from belief_dist.sharding.zero1 import Zero1Reducer
from belief_dist.sharding.zero2 import Zero2Reducer


class MicroBatchReducer(Zero2Reducer):
    """Reduces micro-batches as ZeRO-2 does, in as many rounds as the step must have."""

    def __init__(self, *args: Any, micro_batches: int, **kwargs: Any) -> None:
        """See `GradReducer`.

        Args:
            args: Those of `GradReducer`.
            micro_batches: Of a step, over all ranks.
            kwargs: Those of `GradReducer`.
        """
        super().__init__(*args, **kwargs)
        self._micro_batches = micro_batches
        world_size = self._comm.world_size
        self._share = len(range(self._comm.rank, micro_batches, world_size))  # of this rank
        self._rounds_of_step = len(range(0, micro_batches, world_size))
        self._passes = 0  # backward passes since the last step
        self._is_finished = False  # all rounds are; the step has taken them, or has failed

    # - Backward

    def _enter_backward(self) -> None:
        if self._is_finished:
            self._begin_step()
        elif self._rounds and not any(self._arrived):
            gone, zeroed = self._find_dropped()
            for index in [*gone, *zeroed][:1]:
                self.spoiled = self.spoiled or (
                    f"the gradient of parameter {self._label(index)} was set to None or zero "
                    f"after {self._passes} of this rank's {self._share} micro-batches of the step; "
                    f"forget gradients before the first one, or after step()"
                )

    def _begin_step(self) -> None:
        """Forget the sums of the last step, taken or failed: they are no part of the next one."""
        self._drain()
        self._find_dropped()
        self._forget_count()
        self._rounds = 0
        self._used = [False] * len(self._params)
        self.spoiled, self.dropped = None, []

    def _forget_count(self) -> None:
        self._passes = 0
        self._is_finished = self._is_spent = self._local_only = False

    def _begin_pass(self, task: int) -> None:
        super()._begin_pass(task)
        self._passes += 1
        self._local_only = self._passes > self._share

    def _take(self, index: int) -> None:
        if not self._local_only:
            super()._take(index)
            return
        # There is no round for a pass too many.
        grad = self._params[index].grad
        if isinstance(grad, ShardedGrad):
            grad.take_added()
        else:
            self._params[index].grad = None

    def _num_addends(self) -> int:
        return min(
            self._comm.world_size, self._micro_batches - self._rounds * self._comm.world_size
        )

    def _end_round(self) -> None:
        super()._end_round()
        # Now, and not in `step`: the others' backward may wait for this rank's part of the last
        # round, and its script for theirs before it comes to `step`.
        if self._passes >= self._share:
            self._join_rounds()

    def _join_rounds(self) -> None:
        """Take part in the rounds that are left, with nothing."""
        while self._rounds < self._rounds_of_step:
            super()._end_round()
            if self._comm.world_size == 1:  # nobody waits for more
                return

    # - Step

    def finish(self) -> None:
        """See `GradReducer.finish`."""
        if self._is_spent:
            self._begin_step()
        if self._is_finished:  # the step has failed, and is tried again
            return
        is_interrupted = self.is_interrupted
        if is_interrupted:  # no rank takes what this one has
            self.end_interrupted()
        elif self._take_assigned():
            self._passes += 1
            self._end_round()
        if self._passes != self._share:
            self.spoiled = self.spoiled or self._miscounted()
        self._join_rounds()
        self._is_finished = True
        if not is_interrupted:
            self._forget_dropped()
        self._drain()

    def _miscounted(self) -> str:
        ranks = self._comm.world_size
        return (
            f"{self._passes} backward passes came before step() or zero_grad(), and must be "
            f"{self._share}: of a step's micro_batches={self._micro_batches}, each of them one "
            f"backward pass, rank {self._comm.rank} of {ranks} computes those whose number k is "
            f"{self._comm.rank} modulo {ranks}"
        )

    @property
    def is_awaited(self) -> bool:
        """See `GradReducer.is_awaited`."""
        return self.is_interrupted or (self._passes > 0 and not self._is_finished)

    @property
    def may_give_up(self) -> bool:
        """See `GradReducer.may_give_up`."""
        return self.is_interrupted or self._passes == self._share

    def zero_grad(self, *, set_to_none: bool) -> None:
        """See `GradReducer.zero_grad`."""
        super().zero_grad(set_to_none=set_to_none)
        self._forget_count()


def reducer_for(options: EngineOptions) -> Callable[..., GradReducer]:
    """Return what makes the reducer that `options` ask for, from the arguments of `GradReducer`."""
    if options.micro_batches is not None:
        return partial(MicroBatchReducer, micro_batches=options.micro_batches)
    return Zero1Reducer if options.stage == 1 else Zero2Reducer
