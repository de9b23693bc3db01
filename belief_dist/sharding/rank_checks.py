"""Errors that all ranks raise together, and the sentences about how ranks differ."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from belief_dist.kernels import checksums
from belief_dist.sharding.collectives import Collectives
from belief_dist.sharding.layout import ParamSpec


def raise_together(comm: Collectives, problem: Exception | None) -> None:
    """Raise on every rank if any rank has a `problem`; called by all ranks.

    Raises:
        Exception: `problem` itself where there is one.
        ValueError: Elsewhere, with the sentence of the first rank that has one.
    """
    sentences = comm.exchange(None if problem is None else str(problem))
    if problem is not None:
        raise problem
    for rank, sentence in enumerate(sentences):
        if sentence is not None:
            raise ValueError(f"rank {rank} of the process group reports: {sentence}")


def check_together(comm: Collectives, check: Callable[[], None]) -> None:
    """Check something on every rank, and raise on all if it fails on any; called by all ranks.

    Raises:
        Exception: As `raise_together`.
    """
    problem = None
    try:
        check()
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        problem = error
    raise_together(comm, problem)


def compare_ranks(comm: Collectives, mine: dict[str, list[Any]]) -> None:
    """Check that all ranks hold equal values; called by all ranks.

    Args:
        comm: The process group.
        mine: Lists of values by what they are, compared by their `repr`.

    Raises:
        ValueError: On every rank, naming the first difference.
    """
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    if len(set(comm.exchange(digest))) == 1:
        return
    everyone = comm.exchange({what: [_said(value) for value in mine[what]] for what in mine})
    for rank, theirs in enumerate(everyone):
        for what, values in everyone[0].items():
            for first, other in zip(values, theirs[what], strict=False):
                if first != other:
                    here, there = _what_differs(first, other)
                    raise ValueError(
                        f"ranks disagree about the {what}: the group's rank 0 has {here}, rank "
                        f"{rank} has {there}. Build the same model and optimizer on every rank."
                    )
    raise ValueError("ranks disagree about how many param groups there are.")


def _said(value: Any) -> str | dict[str, str]:
    """Return what ranks tell each other of a value: options one by one."""
    if isinstance(value, dict):
        return {str(name): repr(each) for name, each in value.items()}
    return repr(value)


def _what_differs(first: str | dict[str, str], other: str | dict[str, str]) -> tuple[str, str]:
    """Return two values in words, without the options that are equal."""
    if isinstance(first, str) or isinstance(other, str):
        return str(first), str(other)
    names = [name for name in first | other if first.get(name) != other.get(name)]
    here, there = (
        ", ".join(f"{name}={each[name]}" if name in each else f"no {name}" for name in names)
        for each in (first, other)
    )
    return here, there


def compare_order(
    comm: Collectives,
    specs: Sequence[ParamSpec],
    params: Sequence[Tensor],
    compared: Sequence[int],
) -> None:
    """Check that parameters without names come in one order; called by all ranks.

    Names and shapes have been compared. Where neither tells parameters apart, their values may:
    ranks that begin from one seed have the same ones, each in its place.

    Args:
        comm: The process group.
        specs: Descriptions of all parameters.
        params: What this rank stores of each, before it gets the first rank's values.
        compared: Which of them these ranks share.

    Raises:
        ValueError: On all ranks: one has the values of the first rank in another order.
    """
    if comm.world_size == 1:
        return
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index in compared:
        spec = specs[index]
        if spec.name == str(index):
            alike.setdefault((spec.shape, spec.dtype, spec.group, spec.kind), []).append(index)
    doubtful = [each for each in alike.values() if len(each) > 1]
    found = iter(digests([params[index] for each in doubtful for index in each]))
    mine = [tuple(islice(found, len(each))) for each in doubtful]
    everyone = comm.exchange(mine)
    for place, each in enumerate(doubtful):
        orders: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        for rank, theirs in enumerate(everyone):
            orders.setdefault(tuple(sorted(theirs[place])), {}).setdefault(theirs[place], rank)
        for ranks in orders.values():
            if len(ranks) > 1:
                first, second, *_ = ranks.values()
                raise ValueError(
                    f"ranks {first} and {second} have the parameters {each} in another order: they "
                    f"are alike but for their values, which are the same ones at other places. "
                    f"List parameters in one order on every rank, and pass "
                    f"model.named_parameters(), whose names are compared."
                )


def are_apart(comm: Collectives, sums: Mapping[int, int]) -> bool:
    """Return whether ranks have other checksums of their copies; called by all ranks.

    Args:
        comm: The ranks.
        sums: Of each bucket, by its number.
    """
    return len({tuple(each.values()) for each in comm.exchange(sums)}) > 1


def replica_fault(
    comm: Collectives, sums: Mapping[int, int], buckets: Sequence[Mapping[str, Tensor]]
) -> str:
    """Return a sentence that tells which ranks' copies of which parameter differ.

    Called by all ranks.

    Args:
        comm: The process group.
        sums: One checksum for each bucket, by its number.
        buckets: Parameters by their label, of all buckets.
    """
    position, odd = _first_difference([list(each.values()) for each in comm.exchange(sums)])
    bucket = list(sums)[position]
    where = f"of one of the parameters {', '.join(buckets[bucket])}"
    params = digests(list(buckets[bucket].values()))
    everyone = comm.exchange(params)
    if len(set(map(tuple, everyone))) > 1:  # else the gather has spread one copy since
        param, odd = _first_difference(everyone)
        where = f"of parameter {list(buckets[bucket])[param]}"
    if odd:
        which = f"rank {' and '.join(map(str, odd))} differs from the others"
    else:
        which = "none has a majority, so that any may be the wrong one"
    return (
        f"the copies {where} (bucket {bucket}) differ between the {len(everyone)} ranks of the "
        f"process group: {which}. Code has "
        f"changed it on some ranks only, or memory or the network is faulty. Nothing was updated; "
        f"give all ranks equal weights, for example from a checkpoint."
    )


def digests(tensors: Sequence[Tensor]) -> list[int]:
    """Return a checksum of the bits of each tensor."""
    if not tensors:
        return []
    padded = []
    for tensor in tensors:
        values = tensor.detach().contiguous().view(-1).view(torch.uint8)
        words = values.new_zeros(-(-values.numel() // 8) * 8)
        words[: values.numel()] = values
        padded.append(words)
    found: list[int] = checksums(padded, [0] * len(padded)).tolist()
    return found


def _first_difference(everyone: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
    """Return the first position at which ranks differ, and the ranks that differ from most.

    If no value has a majority, that is no rank.
    """
    for position, values in enumerate(zip(*everyone, strict=True)):
        if len(set(values)) > 1:
            most, count = Counter(values).most_common(1)[0]
            if 2 * count <= len(values):
                return position, []
            return position, [rank for rank, value in enumerate(values) if value != most]
    raise AssertionError("all ranks are equal")
