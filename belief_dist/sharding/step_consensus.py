"""What all ranks must agree on: sentences at construction, and one small message per step.

The message is a sum of integers, so it has the same value on every rank and no order matters:

===================  ============================================================================
words                meaning
===================  ============================================================================
``norm.NUM_WORDS``   exact squares of the gradients, and how many elements are not finite
2                    fingerprint of the step: its number, all options, the loss scale
2                    checksum of this rank's copy of all parameters
one per parameter    how many ranks have a gradient for it
one per bucket       when its gradients were complete; in the first step only
===================  ============================================================================

Whether all ranks sent an equal word x is read from the sums of x and of a square that x fixes:
both must be as many times a rank's own as there are ranks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from belief_dist.norm import NUM_WORDS, nonfinite_count
from belief_dist.sharding.collectives import Collectives

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Verdict(IntEnum):
    """What all ranks do with a step."""

    UPDATE = 0
    NOT_FINITE = 1
    STEPS_DIFFER = 2
    REPLICAS_DIFFER = 3
    APART_ELSEWHERE = 4  # in another part of a tensor-parallel model


@dataclass(frozen=True)
class Agreed:
    """The outcome of a step's message, the same on every rank.

    Attributes:
        bins: (norm.NUM_WORDS,), int64: the squares of all gradients.
        verdict: One element, int64: a `Verdict`, on the device of the parameters.
        used: Which parameters have a gradient on some rank.
        order: Bucket indices in the order in which gradients were complete, if that was asked.
    """

    bins: Tensor
    verdict: Tensor
    used: list[bool]
    order: list[int] | None


def agree(
    links: Collectives,
    *,
    bins: Tensor,
    used: Sequence[bool],
    step: Tensor,
    replica: Tensor,
    completed: Sequence[int] | None = None,
    num_buckets: int = 0,
) -> Agreed:
    """Exchange the message of one step; called by all ranks.

    The host waits for the answer only where a rank lacks a gradient or `completed` is given.

    Args:
        links: The process group.
        bins: (norm.NUM_WORDS,), int64: the squares of this rank's shards.
        used: Which parameters have a gradient on this rank.
        step: One element, int64: equal on ranks that are at the same step, see `fingerprint`.
        replica: One element, int64: the checksum of this rank's parameters, see `checksum`.
        completed: Buckets in the order in which their gradients were complete on this rank, or
            None to send nothing about it. All ranks must give it, or none.
        num_buckets: How many buckets there are.
    """
    device, count = bins.device, len(used)
    own = torch.stack([step, _mixed(step), replica, _mixed(replica)])
    flags = torch.ones(count, dtype=torch.int64, device=device)
    if not all(used):
        flags = torch.tensor(used, dtype=torch.int64, device=device)
    words = [bins, own, flags]
    if completed is not None:
        turns = list(range(num_buckets, 2 * num_buckets))  # after all that were complete
        for turn, bucket in enumerate(completed):
            turns[bucket] = turn
        words.append(torch.tensor(turns, dtype=torch.int64, device=device))
    message = torch.cat(words)
    links.sum_(message)

    total, flags = message[:NUM_WORDS], message[NUM_WORDS + 4 :][:count]
    same = (message[NUM_WORDS : NUM_WORDS + 4] == own * links.num_ranks).view(2, 2).all(1)
    verdict = torch.where(nonfinite_count(total) > 0, Verdict.NOT_FINITE, Verdict.UPDATE)
    verdict = torch.where(same[1], verdict, Verdict.REPLICAS_DIFFER)
    verdict = torch.where(same[0], verdict, Verdict.STEPS_DIFFER)
    # A rank that has used every parameter need not wait for the answer of the others.
    agreed_use = list(used) if all(used) else (flags > 0).tolist()
    order = None
    if completed is not None:
        times = message[NUM_WORDS + 4 + count :].tolist()
        order = sorted(range(num_buckets), key=lambda bucket: (times[bucket], bucket))
    return Agreed(total, verdict, agreed_use, order)


def agree_across(parts: Collectives, agreed: Agreed) -> Agreed:
    """Agree with the ranks that hold other parts of a tensor-parallel model; called by all.

    Args:
        parts: Those ranks, one for each part.
        agreed: What this part's ranks have agreed on.

    Returns:
        The same with the squares of all parts, and a verdict other than UPDATE if any part has one.
    """
    verdicts = torch.zeros(len(Verdict), dtype=torch.int64, device=agreed.bins.device)
    message = torch.cat([agreed.bins, verdicts.index_fill_(0, agreed.verdict.view(1), 1)])
    parts.sum_(message)
    verdicts = message[NUM_WORDS:]
    joint = torch.where(verdicts[Verdict.NOT_FINITE] > 0, Verdict.NOT_FINITE, Verdict.UPDATE)
    is_apart = verdicts[Verdict.STEPS_DIFFER :].sum() > 0
    joint = torch.where(is_apart, Verdict.APART_ELSEWHERE, joint)
    own = agreed.verdict
    return replace(
        agreed,
        bins=message[:NUM_WORDS],
        verdict=torch.where(own >= Verdict.STEPS_DIFFER, own, joint),
    )


def _mixed(word: Tensor) -> Tensor:
    return (word ^ (word >> 32)).square()


def fingerprint(facts: Any, loss_scale: Tensor | None, device: torch.device) -> Tensor:
    """Return one int64 element that is equal on ranks with equal `facts` (by `repr`) and scale."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).digest()
    word = torch.tensor(int.from_bytes(digest, "big", signed=True), device=device)
    return word if loss_scale is None else word + loss_scale.double().view(torch.int64).view(())


def checksums(flats: Sequence[Tensor]) -> Tensor:
    """Return one int64 sum for each flat buffer, which changes with any bit of it."""
    return torch.stack([flat.view(torch.int64).sum() for flat in flats])


def replica_fault(
    links: Collectives, sums: list[int], buckets: Sequence[Mapping[str, Tensor]]
) -> str:
    """Return a sentence that tells which ranks' copies of which parameter differ.

    Called by all ranks.

    Args:
        links: The process group.
        sums: One checksum for each bucket.
        buckets: Parameters by their label.
    """
    bucket, odd = _first_difference(links.exchange(sums))
    where = f"of one of the parameters {', '.join(buckets[bucket])}"
    params = [int(p.contiguous().view(_WORDS[p.itemsize]).sum()) for p in buckets[bucket].values()]
    everyone = links.exchange(params)
    if len(set(map(tuple, everyone))) > 1:  # else the gather has spread one copy since
        param, odd = _first_difference(everyone)
        where = f"of parameter {list(buckets[bucket])[param]}"
    return (
        f"the copies {where} (bucket {bucket}) differ between the {len(everyone)} ranks of the "
        f"process group: rank {' and '.join(map(str, odd))} differs from the others. Code has "
        f"changed it on some ranks only, or memory or the network is faulty. Nothing was updated; "
        f"give all ranks equal weights, for example from a checkpoint."
    )


def _first_difference(everyone: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
    """Return the first position at which ranks differ, and the ranks that are in the minority."""
    for position, values in enumerate(zip(*everyone, strict=True)):
        if len(set(values)) > 1:
            most = Counter(values).most_common(1)[0][0]
            return position, [rank for rank, value in enumerate(values) if value != most]
    raise AssertionError("all ranks are equal")


def raise_together(links: Collectives, problem: Exception | None) -> None:
    """Raise on every rank if any rank has a `problem`; called by all ranks.

    Raises:
        Exception: `problem` itself where there is one.
        ValueError: Elsewhere, with the sentence of the first rank that has one.
    """
    sentences = links.exchange(None if problem is None else str(problem))
    if problem is not None:
        raise problem
    for rank, sentence in enumerate(sentences):
        if sentence is not None:
            raise ValueError(f"rank {rank} of the process group reports: {sentence}")


def compare_ranks(links: Collectives, mine: dict[str, list[Any]]) -> None:
    """Check that all ranks hold equal values; called by all ranks.

    Args:
        links: The process group.
        mine: Lists of values by what they are, compared by their `repr`.

    Raises:
        ValueError: On every rank, naming the first difference.
    """
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    if len(set(links.exchange(digest))) == 1:
        return
    everyone = links.exchange({what: [repr(value) for value in mine[what]] for what in mine})
    for rank, theirs in enumerate(everyone):
        for what, values in everyone[0].items():
            for first, other in zip(values, theirs[what], strict=False):
                if first != other:
                    raise ValueError(
                        f"ranks disagree about the {what}: the group's rank 0 has {first}, rank "
                        f"{rank} has {other}. Build the same model and optimizer on every rank."
                    )
    raise ValueError("ranks disagree about how many param groups there are.")
