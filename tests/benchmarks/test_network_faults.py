"""A network that fails for a while changes no bit; if it does for ever, every rank tells so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import network
from benchmarks.network_faults import (
    CUT,
    DOWN,
    FAULTS,
    HOSTS,
    LOSS,
    SLOW,
    UNDISTURBED,
    Case,
    Outcome,
    cases,
    run_case,
)

OURS, TWO_HOSTS = "ShardedAdaBelief", "ShardedAdaBelief, 2 hosts x 2"

pytestmark = pytest.mark.skipif(
    network.missing_tools() is not None, reason=str(network.missing_tools())
)


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[Outcome]:
    outcome = run_case(Case(OURS, UNDISTURBED))
    assert not outcome.hangs and not any(outcome.errors), outcome
    yield outcome


@pytest.mark.parametrize(
    "case",
    [Case(OURS, SLOW), Case(OURS, LOSS), Case(OURS, DOWN, "sum", 12)],
    ids=lambda case: case.fault,
)
def test_training_goes_on_with_the_same_bits(case: Case, undisturbed: Outcome) -> None:
    try:
        outcome = run_case(case)
    except RuntimeError as error:  # of a kernel without htb, or without filters by a program
        assert case.fault == LOSS
        pytest.skip(str(error))
    assert not outcome.hangs and not any(outcome.errors), outcome
    assert outcome.bits == undisturbed.bits
    # It has felt something.
    assert outcome.lost > 20 if case.fault == LOSS else outcome.total > undisturbed.total + 1


@pytest.mark.parametrize(
    "case",
    [Case(OURS, CUT, "agreement", 12), Case(TWO_HOSTS, CUT, "gather", 14)],
    ids=lambda case: case.phase,
)
def test_every_rank_ends_and_tells_what_it_has_waited_for(case: Case) -> None:
    outcome = run_case(case)
    assert not outcome.hangs and len(outcome.errors) == len(HOSTS[case.engine])
    assert outcome.seconds is not None and 2.5 < outcome.seconds < 20
    assert outcome.is_named == len(outcome.errors), outcome.errors
    assert outcome.kept is (True if case.phase == "agreement" else None)


def test_cases_begin_with_an_undisturbed_one() -> None:
    found = cases()
    for engine in HOSTS:
        own = [case.fault for case in found if case.engine == engine]
        assert own[0] == UNDISTURBED and set(own[1:]) == set(FAULTS)
