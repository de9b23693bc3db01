"""What all ranks decide about a step, from one small message.

The message is a sum of integers, so it has the same value on every rank and no order matters:

===================  ============================================================================
words                meaning
===================  ============================================================================
``norm.NUM_WORDS``   exact squares of the gradients, and how many elements are not finite; as many
                     words more for each param group that has a norm of its own
2                    fingerprint of the step: its number, all options, the loss scale
2                    checksum of this rank's copy of all parameters
4                    how many ranks have a gradient that must not be taken; how many give up; how
                     many have parameters that were changed without their masters; how many have
                     read states that they had not written
2                    with sets of ranks: what these have found among themselves, see `rank_sets`
one per parameter    how many ranks have a gradient for it, and world_size + 1 for each rank where
                     it was set to None after its reduction
one per bucket       when its gradients were complete; in the first step only
===================  ============================================================================

Whether all ranks sent an equal word x is read from the sums of x and of a square that x fixes:
both must be as many times a rank's own as there are ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from belief_dist.async_device import LateRead, upload
from belief_dist.kernels import checksums
from belief_dist.norm import nonfinite_count
from belief_dist.sharding.bucket import BucketBuffers
from belief_dist.sharding.collectives import Collectives, naming
from belief_dist.sharding.grad_reducer import GradReducer
from belief_dist.sharding.process_groups import ModelParallel
from belief_dist.sharding.rank_sets import RankSet, agree_inside, mixed, read_use, use_words


class Verdict(IntEnum):
    """What all ranks do with a step."""

    UPDATE = 0
    NOT_FINITE = 1
    GIVEN_UP = 2  # after an exception in backward, on some rank
    SPIKE = 3  # the gradient is far larger than those before, see `spike_guard`
    STEPS_DIFFER = 4  # this and what follows is an error, or repaired
    REPLICAS_DIFFER = 5
    MODEL_PARALLEL_PEER_FAILED = 6  # another part of a tensor-parallel model has one of these
    GRADIENTS_SPOILED = 7  # changed after their reduction, on some rank
    PARAMS_EDITED = 8  # without their masters, on some rank
    STATES_DIFFER = 9  # from those that some rank has written
    PEER_REPAIRS = 10  # another part of a tensor-parallel model makes its copies equal again


class Skip(NamedTuple):
    """A step that all ranks have skipped: its number as in `LastStep`, and why."""

    number: int
    verdict: Verdict
    why: str


class LastStep(NamedTuple):
    """What became of a step, on all ranks.

    Attributes:
        number: Counts the calls of `step`, from 1 on; 0 before the first.
        was_taken: Whether parameters, masters and states are those after it, and not before it.
        why_not: Why it was not taken, or nothing.
    """

    number: int
    was_taken: bool
    why_not: str


NO_STEP = LastStep(0, False, "there was no step yet")
RAISED = "it ended in an exception, before anything was updated"


@dataclass(frozen=True)
class Decision:
    """The outcome of a step's message, the same on every rank.

    Attributes:
        norm_bins: int64: the squares of all gradients, from `GradReducer.norm_bins`.
        verdict: One element, int64: a `Verdict`, on the device of the parameters.
        used: Which parameters have a gradient on some rank.
        order: Bucket indices in the order in which gradients were complete, if that was asked.
    """

    norm_bins: Tensor
    verdict: Tensor
    used: list[bool]
    order: list[int] | None

    @property
    def skip(self) -> Tensor:
        """Whether nothing is updated: one element, bool, on the device of the parameters."""
        return self.verdict > Verdict.UPDATE


class StepConsensus:
    """Has all ranks decide about each step, and keeps the decision until the host has read it.

    Attributes:
        calls: How many steps were decided about.
        defers: Whether the host reads a decision only in the next step. On a GPU the host runs
            ahead of the device; by the next step the decision has long been there.
        unread: What was decided about the last step and the host has not read yet: the verdict, and
            the parameters whose steps were counted.
        replica_sums: (number of buckets,), int64: what this rank sent of its parameters.
        spoiled: What this rank knew of a gradient that must not be taken, see `GradReducer`; kept
            like the sums, because the reducer forgets it when the gradients are forgotten.
        dropped: Likewise, of which parameters this rank had dropped the gradients.
    """

    def __init__(
        self,
        comm: Collectives,
        model_parallel: ModelParallel,
        *,
        compare: bool,
        repairs: bool,
        defers: bool,
    ) -> None:
        """Begin with the first step.

        Args:
            comm: The ranks that share the states, or keep copies of them.
            model_parallel: The ranks that hold other parts of the model.
            compare: Compare a checksum of all parameters.
            repairs: Copies that differ are made equal again.
            defers: See above.
        """
        self._comm = comm
        self._model_parallel = model_parallel
        self._compares = compare
        self._repairs = repairs
        self._knows_order = comm.world_size == 1
        self.calls = 0
        self.defers = defers
        self.unread: tuple[LateRead, list[int]] | None = None
        self.replica_sums = torch.zeros(0, dtype=torch.int64)
        self.spoiled: str | None = None
        self.dropped: list[int] = []

    def forget_order(self) -> None:
        """Ask in the next step for the order in which gradients are complete."""
        self._knows_order = self._comm.world_size == 1

    def decide(
        self,
        reducer: GradReducer,
        buckets: Sequence[BucketBuffers],
        rank_sets: Sequence[RankSet],
        options: Any,
        late_options: Sequence[Tensor],
        loss_scale: Tensor | None,
        *,
        gives_up: bool,
        edited: Tensor | None,
        corrupt: Tensor | None,
    ) -> Decision:
        """Exchange the message of a step; called by all ranks when all reductions have ended.

        Args:
            reducer: Of the gradients.
            buckets: Whose parameters are compared.
            rank_sets: That of all ranks first; together they have every parameter once.
            options: What must be equal on all ranks, by its `repr`.
            late_options: Numbers on the device of which the same holds, by their value.
            loss_scale: Likewise; one element, or None.
            gives_up: Whether this rank has no gradient for the step, see `grad_reducer`.
            edited: From `DataEdits.take_over`.
            corrupt: One element: whether this rank has read states that it had not written.
        """
        self.calls += 1
        bins = reducer.norm_bins
        compares = self._compares and any(each.comm.world_size > 1 for each in rank_sets)
        if compares:
            flats = [bucket.flat_param for bucket in buckets]
            # Buckets are multiples of 128 bytes. Integers wrap around, and so add in any order.
            places = accumulate((flat.nbytes // 8 for flat in flats[:-1]), initial=0)
            self.replica_sums = checksums(flats, list(places))
        self.spoiled, self.dropped = reducer.spoiled, list(reducer.dropped)
        is_spoiled = self.spoiled is not None
        used, dropped = list(reducer.used()), self.dropped
        sums = self.replica_sums if compares else None
        everyone, *own = rank_sets
        inside = None
        for ranks in own:
            found = agree_inside(ranks, used, dropped, sums, bins.device)
            if found is not None:
                inside = found if inside is None else inside + found
        if self._comm.world_size == 1:
            verdict = decide_alone(
                bins,
                spoiled=is_spoiled,
                gives_up=gives_up,
                edited=edited,
                corrupt=corrupt,
                inside=inside,
            )
            decision = Decision(bins, verdict, used, None)
        else:
            completed = None if self._knows_order else reducer.schedule.completed
            self._knows_order = True
            late = [*([] if loss_scale is None else [loss_scale]), *late_options]
            decision = agree(
                self._comm,
                norm_bins=bins,
                used=everyone.of_params(used),
                dropped=everyone.places_of(dropped),
                step=fingerprint((self.calls, options), late, bins.device),
                replica=everyone.checksum(sums, bins.device),
                inside=inside,
                spoiled=is_spoiled,
                gives_up=gives_up,
                edited=edited,
                corrupt=corrupt,
                completed=completed,
                num_buckets=len(buckets),
            )
            everyone.write_back(used, decision.used)
            decision = replace(decision, used=used)
        if self._model_parallel.comm.world_size > 1:
            decision = agree_with_other_parts(
                self._model_parallel.comm, decision, repairs=self._repairs
            )
        return decision


def decide_alone(
    norm_bins: Tensor,
    *,
    spoiled: bool,
    gives_up: bool,
    edited: Tensor | None,
    corrupt: Tensor | None = None,
    inside: Tensor | None = None,
) -> Tensor:
    """Return the `Verdict` of a single rank, one element; the arguments are those of `agree`."""
    verdict = torch.where(nonfinite_count(norm_bins) > 0, Verdict.NOT_FINITE, Verdict.UPDATE)
    if spoiled:
        verdict.fill_(Verdict.GRADIENTS_SPOILED)
    if inside is not None:
        verdict = torch.where(inside[0] > 0, Verdict.GRADIENTS_SPOILED, verdict)
    if edited is not None:
        verdict = torch.where(edited, Verdict.PARAMS_EDITED, verdict)
    if inside is not None:
        verdict = torch.where(inside[1] > 0, Verdict.REPLICAS_DIFFER, verdict)
    if gives_up:
        verdict.fill_(Verdict.GIVEN_UP)
    if corrupt is not None:
        verdict = torch.where(corrupt, Verdict.STATES_DIFFER, verdict)
    return verdict


def agree(
    comm: Collectives,
    *,
    norm_bins: Tensor,
    used: Sequence[bool],
    step: Tensor,
    replica: Tensor,
    inside: Tensor | None = None,
    dropped: Sequence[int] = (),
    spoiled: bool = False,
    gives_up: bool = False,
    edited: Tensor | None = None,
    corrupt: Tensor | None = None,
    completed: Sequence[int] | None = None,
    num_buckets: int = 0,
) -> Decision:
    """Exchange the message of one step; called by all ranks.

    The host waits for the answer only where a rank lacks a gradient or `completed` is given.

    Args:
        comm: The process group.
        norm_bins: int64: the squares of this rank's shards, from `GradReducer.norm_bins`.
        used: Which parameters have a gradient on this rank.
        dropped: Which parameters, by index, had one when it was reduced.
        step: One element, int64: equal on ranks that are at the same step, see `fingerprint`.
        replica: One element, int64: the checksum of this rank's parameters, see `checksum`.
        inside: (2,), int64, from `rank_sets.agree_inside`; None if there is none, on all ranks.
        spoiled: Whether this rank has a gradient that must not be taken.
        gives_up: Whether this rank gives the step up.
        edited: One element: whether parameters were changed without their masters on this rank.
        corrupt: One element: whether states were read that this rank had not written.
        completed: Buckets in the order in which their gradients were complete on this rank, or
            None to send nothing about it. All ranks must give it, or none.
        num_buckets: How many buckets there are.
    """
    # A word alone could agree by accident in its sum (x + 1 and x - 1): each travels with a square.
    device, count = norm_bins.device, len(used)
    own = torch.stack([step, mixed(step), replica, mixed(replica)])
    num_faults = 4 if inside is None else 6
    faults = torch.zeros(num_faults, dtype=torch.int64, device=device)
    if spoiled:
        faults[0].fill_(1)
    if gives_up:
        faults[1].fill_(1)
    if edited is not None:
        faults[2].copy_(edited)
    if corrupt is not None:
        faults[3].copy_(corrupt)
    if inside is not None:
        faults[4:].copy_(inside)
    words = [norm_bins, own, faults, use_words(used, dropped, comm.world_size, device)]
    if completed is not None:
        turns = list(range(num_buckets, 2 * num_buckets))  # after all that were complete
        for turn, bucket in enumerate(completed):
            turns[bucket] = turn
        words.append(upload(turns, torch.int64, device))
    message = torch.cat(words)
    with naming(comm, "agreeing about the step"):
        comm.sum_(message)

    squares = len(norm_bins)
    total, rest = message[:squares], message[squares + 4 :]
    faults, flags, times = rest.split([num_faults, count, len(rest) - num_faults - count])
    same = (message[squares : squares + 4] == own * comm.world_size).view(2, 2).all(1)
    # The graver finding wins: ranks at other steps may well have other gradients. Computed on the
    # device, so that the host need not wait.
    verdict = torch.where(nonfinite_count(total) > 0, Verdict.NOT_FINITE, Verdict.UPDATE)
    agreed_use, torn = read_use(flags, used, comm.world_size)
    verdict = torch.where(torn | (faults[0] > 0), Verdict.GRADIENTS_SPOILED, verdict)
    if inside is not None:
        verdict = torch.where(faults[4] > 0, Verdict.GRADIENTS_SPOILED, verdict)
    verdict = torch.where(faults[2] > 0, Verdict.PARAMS_EDITED, verdict)
    is_same = same[1] if inside is None else same[1] & (faults[5] == 0)
    verdict = torch.where(is_same, verdict, Verdict.REPLICAS_DIFFER)
    verdict = torch.where(same[0], verdict, Verdict.STEPS_DIFFER)
    # A rank that gives up knows nothing of the others' loss scale, and nothing is updated anyway.
    verdict = torch.where(faults[1] > 0, Verdict.GIVEN_UP, verdict)
    if corrupt is not None:  # on all ranks alike; whatever else is wrong, no step must use these
        verdict = torch.where(faults[3] > 0, Verdict.STATES_DIFFER, verdict)
    order = None
    if completed is not None:
        turns = times.tolist()
        order = sorted(range(num_buckets), key=lambda bucket: (turns[bucket], bucket))
    return Decision(total, verdict, agreed_use, order)


def agree_with_other_parts(
    comm: Collectives, decision: Decision, *, repairs: bool = False
) -> Decision:
    """Agree with the ranks that hold other parts of a tensor-parallel model; called by all.

    Args:
        comm: Those ranks, one for each part.
        decision: That of this part's ranks.
        repairs: Copies that differ are made equal again.

    Returns:
        The same with the squares of all parts, and a verdict other than UPDATE if any part has one.
    """
    verdicts = torch.zeros(len(Verdict), dtype=torch.int64, device=decision.norm_bins.device)
    message = torch.cat([decision.norm_bins, verdicts.index_fill_(0, decision.verdict.view(1), 1)])
    comm.sum_(message)
    squares = len(decision.norm_bins)
    verdicts = message[squares:]
    joint = torch.where(verdicts[Verdict.NOT_FINITE] > 0, Verdict.NOT_FINITE, Verdict.UPDATE)
    joint = torch.where(verdicts[Verdict.GIVEN_UP] > 0, Verdict.GIVEN_UP, joint)
    differ = verdicts[Verdict.REPLICAS_DIFFER] if repairs else verdicts.new_zeros(())
    joint = torch.where(differ > 0, Verdict.PEER_REPAIRS, joint)
    has_failed = verdicts[Verdict.STEPS_DIFFER :].sum() > differ
    joint = torch.where(has_failed, Verdict.MODEL_PARALLEL_PEER_FAILED, joint)
    own = decision.verdict
    # Parts that repair have to meet those that do not; where one has failed, none does.
    is_repaired = (own == Verdict.REPLICAS_DIFFER) & repairs
    return replace(
        decision,
        norm_bins=message[:squares],
        verdict=torch.where(
            (own >= Verdict.STEPS_DIFFER) & ~(is_repaired & has_failed), own, joint
        ),
    )


def fingerprint(facts: Any, late: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return one int64 element that is equal on ranks with equal `facts` and `late` numbers.

    Args:
        facts: Compared by their `repr`.
        late: Numbers on the device, one element each: their bits join there.
        device: Of the result.
    """
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).digest()
    # Filled in, not copied: a copy from the host would wait for the device.
    word = torch.full((), int.from_bytes(digest, "big", signed=True), device=device)
    for position, number in enumerate(late):
        word = word + number.double().view(torch.int64).view(()) * (2 * position + 1)
    return word
