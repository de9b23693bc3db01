"""Who gets which samples of numbered micro-batches, and which random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from belief_dist.data import MicroBatchSampler, seeded
from tests.harness.threads import run_threads

# Length of a dataset, samples of a micro-batch, micro-batches of a step, drop_last.
PLANS = st.tuples(st.integers(1, 90), st.integers(1, 5), st.integers(1, 9), st.booleans()).filter(
    lambda plan: plan[0] >= plan[2] * (plan[1] if plan[3] else 1)
)


def sampler(plan: Any, rank: int = 0, world_size: int = 1, **more: Any) -> MicroBatchSampler:
    length, size, count, drop_last = plan
    return MicroBatchSampler(
        length, size, count, drop_last=drop_last, rank=rank, world_size=world_size, **more
    )


def epoch(dealt: list[MicroBatchSampler], steps: int | None = None) -> dict[Any, list[int]]:
    """Take `steps` steps, or all, of an epoch on all ranks: samples by (step, micro-batch)."""
    found: dict[Any, list[int]] = {}
    for each in dealt:
        for number, (step, micro_batches) in enumerate(each.steps(each), start=1):
            for k, batch in micro_batches:
                assert (step, k) not in found
                found[step, k] = batch
            if number == steps:
                break
    return found


@settings(max_examples=150, deadline=None)
@given(PLANS, st.integers(1, 12), st.integers(0, 3))
def test_any_number_of_ranks_deals_alike(plan: Any, ranks: int, number: int) -> None:
    length, size, count, drop_last = plan
    alone, dealt = sampler(plan), [sampler(plan, rank, ranks) for rank in range(ranks)]
    for each in (alone, *dealt):
        each.set_epoch(number)
    one, many = epoch([alone]), epoch(dealt)
    assert one == many
    steps = alone.steps_per_epoch
    assert set(one) == {(number * steps + i, k) for i in range(steps) for k in range(count)}
    samples = [sample for _, batch in sorted(one.items()) for sample in batch]
    assert len(samples) == len(set(samples)) and set(samples) <= set(range(length))
    assert len(samples) == (length - length % (size * count) if drop_last else length)
    for i in range(steps):
        sizes = [len(one[number * steps + i, k]) for k in range(count)]
        assert 1 <= min(sizes) and max(sizes) <= min(sizes) + 1 <= size + 2
        assert i == steps - 1 or sizes == [size] * count


@settings(max_examples=150, deadline=None)
@given(PLANS, st.data())
def test_it_continues_in_mid_epoch_at_another_number(plan: Any, data: Any) -> None:
    """Stopped after any step and loaded by other ranks, which have dealt something before."""
    whole = epoch([sampler(plan)])
    steps = sampler(plan).steps_per_epoch
    found: dict[Any, list[int]] = {}
    state = sampler(plan).state_dict()
    done = 0
    while done < steps:
        ranks = data.draw(st.integers(1, 6))
        take = data.draw(st.integers(1, steps - done))
        dealt = [sampler(plan, rank, ranks) for rank in range(ranks)]
        for each in dealt:
            next(iter(each), None)
            each.set_epoch(4)
            each.load_state_dict(state)
            each.set_epoch(0)  # as a loop over epochs does, which begins with the loaded one
        part = epoch(dealt, take)
        assert not part.keys() & found.keys()
        found |= part
        done += take
        states = [each.state_dict() for each in dealt]
        assert states == states[:1] * ranks
        state = states[0]
    assert found == whole


def test_epochs_have_their_own_orders() -> None:
    plan = (40, 2, 4, True)
    each = sampler(plan)
    orders = []
    for number in range(3):
        assert each.epoch == number and each.step == number * each.steps_per_epoch
        assert len(each) == 20
        orders.append(list(epoch([each]).values()))
    assert orders[0] != orders[1] != orders[2]
    each.set_epoch(1)
    assert list(epoch([each]).values()) == orders[1]
    assert list(epoch([sampler(plan, seed=1)]).values()) != orders[0]
    straight = epoch([sampler(plan, shuffle=False)])
    assert [i for batch in straight.values() for i in batch] == list(range(40))


def test_a_loader_with_workers_that_run_ahead() -> None:
    """What counts is what was trained on, and not what workers have loaded."""
    data = torch.arange(24)
    each = sampler((24, 2, 3, True), rank=1, world_size=2)
    loader = DataLoader(data, batch_sampler=each, num_workers=1, prefetch_factor=4)
    assert len(loader) == len(each) == 4
    seen = []
    for step, micro_batches in each.steps(loader):
        seen += [(step, k, batch.tolist()) for k, batch in micro_batches]
        assert each.state_dict()["done"] == step + 1
        if step == 1:
            break
    other = sampler((24, 2, 3, True), rank=1, world_size=2)
    other.load_state_dict(each.state_dict())
    assert len(other) == 2
    rest = DataLoader(data, batch_sampler=other)
    for step, micro_batches in other.steps(rest):
        seen += [(step, k, batch.tolist()) for k, batch in micro_batches]
    whole = epoch([sampler((24, 2, 3, True))])
    assert seen == [(step, k, batch) for (step, k), batch in whole.items() if k == 1]


def test_torch_distributed_is_asked_for_the_ranks() -> None:
    def case() -> None:
        found.append(list(MicroBatchSampler(range(12), 2, 3, shuffle=False)))

    found: list[list[list[int]]] = []
    run_threads(4, case)
    assert sorted(found) == [[], [[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    case()
    assert len(found[-1]) == 6


def test_batches_must_all_be_taken() -> None:
    each = sampler((24, 2, 3, True))
    steps = each.steps(each)
    next(steps)
    with pytest.raises(RuntimeError, match=r"step 0 has .* that were not taken: .* its 3"):
        next(steps)
    with pytest.raises(RuntimeError, match="no batch for micro-batch 1 of step 0"):
        for _, micro_batches in each.steps([[0, 1]]):
            list(micro_batches)
    with pytest.raises(ValueError, match="built with batch_sampler=this sampler"):
        next(each.steps(DataLoader(range(24), batch_size=2)))  # type: ignore[arg-type]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dataset": 2.5}, TypeError, r"has no len\(\)"),
    ({"dataset": True}, TypeError, "the length of the dataset must be an integer, got True"),
    ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
    ({"batch_size": "2"}, TypeError, "batch_size must be an integer, got '2'"),
    ({"micro_batches": True}, TypeError, "micro_batches must be an integer, got True"),
    ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
    ({"shuffle": 1}, TypeError, "shuffle must be True or False, got 1"),
    ({"drop_last": None}, TypeError, "drop_last must be True or False, got None"),
    ({"rank": 0}, ValueError, "rank and world_size go together"),
    ({"rank": 2, "world_size": 2}, ValueError, "rank must be below world_size=2, got 2"),
    ({"rank": -1, "world_size": 2}, ValueError, "rank must be >= 0, got -1"),
    ({"batch_size": 7}, ValueError, r"a step takes 21 samples at least .* has 20; .* drop_last=F"),
    ({"micro_batches": 21, "drop_last": False}, ValueError, "a step takes 21 samples .* has 20;"),
]


@pytest.mark.parametrize("more, error, sentence", BAD)
def test_arguments(more: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        MicroBatchSampler(**{"dataset": 20, "batch_size": 2, "micro_batches": 3, **more})


def test_positions_of_others_are_refused() -> None:
    each = sampler((20, 2, 3, True))
    good = each.state_dict()
    for name, value in (("length", 21), ("micro_batches", 4), ("seed", 1), ("drop_last", False)):
        with pytest.raises(ValueError, match=f"{name} is .* here, and the position was saved with"):
            each.load_state_dict({**good, name: value})
    with pytest.raises(ValueError, match="the position is damaged: step 4 of an epoch of 3"):
        each.load_state_dict({**good, "done": 4})
    with pytest.raises(TypeError, match="epoch of the saved position must be an integer"):
        each.load_state_dict({**good, "epoch": None})
    with pytest.raises(TypeError, match="needs a dict, got 3"):
        each.load_state_dict(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        each.set_epoch(-1)
    assert each.state_dict() == good


# - Random numbers


def drawn() -> tuple[Any, ...]:
    return (torch.rand(3).tolist(), random.random(), numpy.random.rand())


@pytest.fixture
def states() -> Iterator[None]:
    """Leave the generators of other tests alone."""
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    numpy.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.mark.usefixtures("states")
def test_a_micro_batch_has_its_own_numbers_and_leaves_others_alone() -> None:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    expected = [drawn(), drawn()]
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    first = drawn()
    with seeded(1, 2, 3):
        inside = drawn()
        with seeded(1, 2, 4):
            drawn()
        after = drawn()
    with pytest.raises(MemoryError), seeded(1, 2, 3):
        assert drawn() == inside
        raise MemoryError
    assert [first, drawn()] == expected
    with seeded(1, 2, 3):
        assert (drawn(), drawn()) == (inside, after)
    others = []
    for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 3, 2), (-1, 2, 3), (2**70, 2, 3)):
        with seeded(*key):
            others.append(drawn())
    assert all(other[i] != inside[i] for other in others for i in range(3))


def test_a_number_is_an_integer() -> None:
    with pytest.raises(TypeError, match=r"step must be an integer, got 1\.0"), seeded(0, 1.0, 2):  # type: ignore[arg-type]
        pass
