"""What a verdict other than "update" means, in words; some are found by asking all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from belief_dist.sharding.collectives import Collectives
from belief_dist.sharding.dtensor import local_part
from belief_dist.sharding.layout import Layout
from belief_dist.sharding.rank_checks import are_apart, compare_ranks, replica_fault
from belief_dist.sharding.rank_sets import RankSet
from belief_dist.sharding.step_consensus import RAISED, StepConsensus, Verdict


def raise_if_apart(
    verdict: Verdict,
    comm: Collectives,
    consensus: StepConsensus,
    rank_sets: Sequence[RankSet],
    *,
    facts: Callable[[], dict[str, list[Any]]],
    label: Callable[[int], str],
    copies: Callable[[], Sequence[Mapping[str, Tensor]]],
    corrupt: Callable[[], str],
) -> None:
    """Raise what all ranks raise for a verdict, if it is an error; called by all ranks.

    Args:
        verdict: About the step.
        comm: The ranks.
        consensus: Which has decided.
        rank_sets: As for `StepConsensus.decide`.
        facts: Returns what else must be equal on all ranks, by what it is.
        label: Names a parameter.
        copies: Returns the parameters of each bucket by their label, when all have arrived.
        corrupt: Returns which states of this rank have flipped bits, or nothing.

    Raises:
        RuntimeError: Parameters differ, a gradient of some rank must not be taken, or memory of
            some rank has lost bits.
        ValueError: Ranks are at different steps, or have different options or loss scales.
    """
    if verdict == Verdict.STEPS_DIFFER:
        compare_ranks(comm, {"number of the step": [consensus.calls], **facts()})
        _raise_spoiled(comm.exchange(consensus.spoiled))  # who joins by zero_grad knows no scale
        raise ValueError("ranks disagree about the loss scale; use equal GradScalers.")
    if verdict == Verdict.MODEL_PARALLEL_PEER_FAILED:
        raise RuntimeError(
            "ranks that hold another part of the tensor-parallel model have come apart, see "
            "their error. Nothing was updated."
        )
    if verdict == Verdict.PARAMS_EDITED:
        raise RuntimeError(
            "parameters were changed through `.data`, of which their masters on this device do "
            "not know. Nothing was updated: call optimizer.refresh_masters() after such a "
            "change, or change the parameter itself under torch.no_grad()."
        )
    if verdict == Verdict.GRADIENTS_SPOILED:
        known = comm.exchange((consensus.spoiled, consensus.dropped))
        _raise_spoiled([sentence for sentence, _ in known])
        first = min(min(dropped) for _, dropped in known if dropped)
        ranks = [rank for rank, (_, dropped) in enumerate(known) if first in dropped]
        raise RuntimeError(
            f"the gradient of parameter {label(first)} was set to None after its "
            f"reduction, but only by rank {ranks}: all ranks must do so, or none, and all must "
            f"have used it. Nothing was updated."
        )
    if verdict == Verdict.STATES_DIFFER:
        found = [(rank, said) for rank, said in enumerate(comm.exchange(corrupt())) if said]
        raise RuntimeError(
            f"{'; '.join(f'{said} of rank {rank}' for rank, said in found)}: bits have changed "
            f"between two steps, so that memory is faulty, or code has written there through "
            f"`.data`. What was updated since may be wrong: go on from a checkpoint."
        )
    if verdict == Verdict.REPLICAS_DIFFER:
        _raise_apart(comm, rank_sets, consensus.replica_sums.tolist(), copies())


def _raise_apart(
    comm: Collectives,
    rank_sets: Sequence[RankSet],
    sums: Sequence[int],
    copies: Sequence[Mapping[str, Tensor]],
) -> None:
    found: list[str] = []
    for ranks in rank_sets:  # all of them, as others wait there
        mine = {number: sums[number] for number in ranks.buckets}
        if ranks.is_all or are_apart(ranks.comm, mine):
            found.append(replica_fault(ranks.comm, mine, copies))
    everyone = [sentence for theirs in comm.exchange(found) for sentence in theirs]
    raise RuntimeError(next(iter([*found, *everyone]), "copies have differed, and are equal now."))


def _raise_spoiled(sentences: Sequence[str | None]) -> None:
    for rank, sentence in enumerate(sentences):
        if sentence is not None:
            raise RuntimeError(f"rank {rank}: {sentence}. Nothing was updated.")


def why_skipped(verdict: Verdict) -> str:
    """Return why all ranks have skipped a step."""
    return {
        Verdict.NOT_FINITE: "a gradient is not finite",
        Verdict.GIVEN_UP: "backward has raised, or gradients were forgotten, on some rank",
        Verdict.REPLICAS_DIFFER: "gradients are partly those of wrong parameters",
        Verdict.PEER_REPAIRS: "copies of another part of the model were made equal again",
    }.get(verdict, RAISED)


def copies_of(
    layout: Layout, params: Sequence[Tensor], label: Callable[[int], str]
) -> list[dict[str, Tensor]]:
    """Return this rank's copies of the parameters of each bucket, by their label."""
    return [
        {label(slot.param): local_part(params[slot.param]) for slot in plan.slots}
        for plan in layout.buckets
    ]
