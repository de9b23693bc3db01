"""Makes the ranks' copies of the parameters equal again, by the copies of most of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from belief_dist.sharding.bucket import BucketBuffers
from belief_dist.sharding.collectives import Collectives
from belief_dist.sharding.rank_checks import are_apart, digests, replica_fault
from belief_dist.sharding.rank_sets import RankSet
from belief_dist.sharding.step_consensus import Verdict

logger = logging.getLogger("belief_dist")

# What is no error where copies are repaired: of ranks whose copies differ, and of other parts'.
REPAIRED = (Verdict.REPLICAS_DIFFER, Verdict.PEER_REPAIRS)


def repair_parts(
    comm: Collectives,
    parts: Collectives,
    rank_sets: Sequence[RankSet],
    sums: Sequence[int] | None,
    buckets: Sequence[BucketBuffers],
    copies: Sequence[Mapping[str, Tensor]],
) -> None:
    """Repair the copies of those parts of a model that need it; called by all ranks of all parts.

    Args:
        comm: The ranks of this part.
        parts: The ranks that hold other parts.
        rank_sets: As for `StepConsensus.decide`.
        sums: One checksum for each bucket, as this rank has sent them; None if this part's copies
            are equal.
        buckets: Of the optimizer.
        copies: The parameters of each bucket by their label.

    Raises:
        RuntimeError: On all ranks: some part could not be repaired.
    """
    problem: RuntimeError | None = None
    for ranks in rank_sets if sums is not None else ():
        assert sums is not None
        mine = {number: sums[number] for number in ranks.buckets}
        if not ranks.is_all and not are_apart(ranks.comm, mine):
            continue
        try:
            repaired = repair_replicas(ranks.comm, mine, buckets, copies)
            logger.warning("copies of parameters differed between ranks, and were %s", repaired)
        except RuntimeError as error:
            problem = problem or error
    failed = parts.exchange(any(comm.exchange(problem is not None)))
    if problem is not None:
        raise problem
    if any(failed):
        raise RuntimeError(
            "ranks that hold another part of the model could not make their copies equal again, "
            "see their error. Nothing was updated."
        )


@torch.no_grad()
def repair_replicas(
    comm: Collectives,
    sums: Mapping[int, int],
    buckets: Sequence[BucketBuffers],
    copies: Sequence[Mapping[str, Tensor]],
) -> str:
    """Give ranks whose copy of a parameter is that of a minority the copy of the others.

    Called by all ranks, before anything is gathered, which would spread a wrong copy.

    Args:
        comm: The process group.
        sums: One checksum for each bucket, by its number, as this rank has sent them.
        buckets: Of the optimizer, all of them.
        copies: The parameters of each bucket by their label.

    Returns:
        What was repaired, in words that are the same on all ranks.

    Raises:
        RuntimeError: On all ranks: a parameter has no copy that most ranks agree about, or none
            differs any more. Nothing was changed then.
    """
    each = zip(*(theirs.values() for theirs in comm.exchange(sums)), strict=True)
    differ = [number for number, values in zip(sums, each, strict=True) if len({*values}) > 1]
    params = [(n, label, param) for n in differ for label, param in copies[n].items()]
    everyone = comm.exchange(digests([param for _, _, param in params]))
    found: list[tuple[str, Tensor, int, list[int]]] = []
    is_hopeless = False
    for (_, label, param), values in zip(params, zip(*everyone, strict=True), strict=True):
        most, count = Counter(values).most_common(1)[0]
        if count < len(values):
            is_hopeless |= 2 * count <= len(values)
            odd = [rank for rank, value in enumerate(values) if value != most]
            found.append((label, param, values.index(most), odd))
    if is_hopeless or not found:
        raise RuntimeError(replica_fault(comm, sums, copies))
    for _, param, source, _ in found:
        good = param.contiguous().view(-1)
        comm.broadcast_(good, source)
        param.copy_(good.view(param.shape))
    for number in differ:
        buckets[number].refresh_edited()
    said = "; ".join(f"parameter {label} of rank {odd}" for label, _, _, odd in found)
    return f"made equal to the copies of the other ranks: {said}"
