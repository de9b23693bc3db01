"""Numbered micro-batches: one job on 1 to 5 ranks, stopped and continued, with the same bits.

One rank is compared with nothing but itself elsewhere: what it computes, micro-batch after
micro-batch, is the definition. Peers on the same data differ, or the test would prove nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from belief_dist import AdaBelief, ShardedAdaBelief, checkpoint
from belief_dist.data import seeded
from belief_dist.options import DEFAULTS
from belief_dist.sharding.across_hosts import AcrossHosts
from tests.harness.hosts import on_hosts
from tests.harness.micro_jobs import (
    SEED,
    STEPS,
    Job,
    Training,
    dataset,
    loss_of,
    model_of,
    sampler_of,
    write,
)
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import Reference, backward, compare
from tests.harness.threads import run_threads

bf16 = torch.bfloat16

# Every pair of choices occurs.
PLANS: list[tuple[dict[str, Any], torch.dtype]] = [
    ({"stage": 1}, torch.float32),
    ({"stage": 2}, bf16),
    ({"stage": 1, "max_grad_norm": 0.5}, bf16),
    ({"stage": 2, "max_grad_norm": 0.5}, torch.float32),
]
SCALED = Job(6, {"stage": 2, "max_grad_norm": 0.5, "ema_decay": 0.9}, scaled=True)
JOBS = [Job(v, options, dtype) for v in (4, 6) for options, dtype in PLANS]
JOBS += [Job(v, *PLANS[i]) for v, i in ((1, 0), (1, 1), (8, 2), (8, 3), (12, 0), (12, 1))]
JOBS += [
    SCALED,
    Job(6, {"state_dtype": torch.uint8, "master": "remainder"}, bf16),
    Job(6, {"ema_decay": 0.9, "ema_dtype": bf16, "master": "remainder8"}, bf16),
    Job(6, {"state_dtype": bf16, "overlap": False}),
    Job(6, {"offload": "cpu", "reduce_dtype": bf16}),
    Job(6, {"shared_memory": False, "stage": 2, "max_grad_norm": 0.5}),
    Job(6, {"max_grad_norm": 0.5, "ema_decay": 0.9}, mesh=True),
    Job(6, {"shared_memory": False, "max_grad_norm": 0.5}, mesh=True),
    Job(6, {"shard_over": "mesh", "master": "remainder8"}, bf16, mesh=True),
]
# Stopped and continued: at how many ranks, and until which step. Epochs have 5 steps.
CONTINUED = replace(SCALED, options={"max_grad_norm": 0.5, "ema_decay": 0.9})
PARTS = {4: (0, 7), 3: (7, 13), 5: (13, 17), 2: (17, STEPS)}


def trains(job: Job, folder: Path) -> None:
    training = Training(job)
    training.train(STEPS)
    write(folder, job.name, training.result())


def continues(folder: Path, first: int, last: int) -> None:
    """Train a part of the run: in another job, at another number of ranks."""
    training = Training(CONTINUED)
    if first:
        training.load(folder / "checkpoints")
    assert training.steps == first
    training.train(last)
    training.save(folder / "checkpoints")
    if last == STEPS:
        write(folder, "continued", training.result())


def by_peers(folder: Path) -> None:
    """DDP, and the optimizer without the option, on the same micro-batches."""
    count, ranks = 6, dist.get_world_size()
    for name in ("DDP", "stage 1", "stage 2"):
        model = model_of(torch.float32)
        optimizer: Any
        if name == "DDP":
            around: Any = DistributedDataParallel(model)
            optimizer = AdaBelief(model.parameters(), **HYPER)
        else:
            around = model
            optimizer = ShardedAdaBelief(model.parameters(), stage=int(name[-1]), **HYPER)
        no_sync = around.no_sync if name == "DDP" else optimizer.no_sync
        sampler = sampler_of(count)
        for step, micro_batches in sampler.steps(DataLoader(dataset(), batch_sampler=sampler)):
            optimizer.zero_grad()
            for k, batch in micro_batches:
                with seeded(SEED, step, k), nullcontext() if k + ranks >= count else no_sync():
                    loss = loss_of(around, batch, torch.float32)
                    (loss / (count // ranks)).backward()
            optimizer.step()
        weights = torch.cat([param.detach().flatten() for param in model.parameters()])
        write(folder, name, {"p": weights})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with what every number of ranks has found, in a folder of its own."""
    folder = tmp_path_factory.mktemp("micro_batches")
    for ranks in (1, *PARTS):
        jobs = [job for job in JOBS if not job.mesh or ranks in (1, 4)]
        cases: list[Callable[[], None]] = [
            partial(trains, job, folder / f"{ranks}") for job in jobs
        ]
        if ranks in PARTS:
            cases.append(partial(continues, folder, *PARTS[ranks]))
        if ranks in (1, 3):
            cases.append(partial(by_peers, folder / f"{ranks}"))
        run_ranks(ranks, folder, *cases)
    return folder


def assert_same(found: dict[str, Any], expected: dict[str, Any], context: str) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), f"{context}: {key}"


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_the_number_of_ranks_changes_no_bit(ranks: int, folder: Path) -> None:
    for job in JOBS:
        if not job.mesh or ranks == 4:
            expected = torch.load(folder / "1" / f"{job.name}.pt")
            assert len(expected["norms"]) == STEPS and expected["p"].isfinite().all()
            found = torch.load(folder / f"{ranks}" / f"{job.name}.pt")
            assert_same(found, expected, f"{ranks} ranks, {job.name}")


def test_what_is_trained_shows_differences(folder: Path) -> None:
    """Clipping clips, steps were skipped, and every choice but those of transport has its bits."""
    plain, clipped = (
        torch.load(folder / "1" / f"{Job(4, {'stage': stage, **more}).name}.pt")
        for stage, more in ((1, {}), (2, {"max_grad_norm": 0.5}))
    )
    assert not torch.equal(plain["p"], clipped["p"])
    assert (plain["norms"] > 0.5).all()
    scaled = torch.load(folder / "1" / f"{SCALED.name}.pt")
    assert scaled["skipped"] == 2 and scaled["steps"].unique().tolist() == [STEPS - 2]


def test_a_run_continues_at_any_number_of_ranks_in_mid_epoch(folder: Path) -> None:
    whole = torch.load(folder / "1" / f"{SCALED.name}.pt")
    assert_same(torch.load(folder / "continued.pt"), whole, "continued at 4, 3, 5, 2 ranks")


@pytest.mark.parametrize("peer", ["DDP", "stage 1", "stage 2"])
def test_peers_differ(peer: str, folder: Path) -> None:
    """With two ranks some would not: halves are exact, and a + b is b + a."""
    one, three = (torch.load(folder / ranks / f"{peer}.pt")["p"] for ranks in ("1", "3"))
    assert not torch.equal(one, three)


# - The sum is that of one process, whatever is used and however it travels


def equals_one_process(count: int, **options: Any) -> None:
    """Parameter 2 is used by the last micro-batch only, and -0 stays -0."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    params = make_params()
    optimizer = ShardedAdaBelief(
        params, micro_batches=count, bucket_bytes=600, max_grad_norm=0.5, **options, **HYPER
    )
    reference = Reference(make_params(), [{**DEFAULTS, **HYPER}] * len(params))
    for step in range(3):
        grads: list[list[torch.Tensor | None]] = [
            [make_grad(s, step, k, i) if i != 2 or k == count - 1 else None for i, s in kinds]
            for k in range(count)
            for kinds in [list(enumerate(SHAPES))]
        ]
        for each in grads:
            each[3] = torch.tensor([-0.0])
        for k in range(rank, count, ranks):
            with optimizer.no_sync():  # there is nothing that it could save
                backward(params, grads[k])
        optimizer.step()
        reference.step(grads, 0.5, count)
        assert optimizer.grad_norm.item() == reference.norm.item()
        compare(optimizer, reference, f"{count} on {ranks}, step {step}")
    # A sum that began with 0, or to which an idle rank had added one, would be +0.
    index, slot = optimizer.layout.place(3)
    position = optimizer.layout.buckets[index].slots.index(slot)
    assert optimizer._engine.buckets[index].own_grad(position).signbit().all()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_equals_one_process(ranks: int, tmp_path: Path) -> None:
    """Through each transport; with fewer micro-batches than ranks, too."""
    cases = [
        partial(equals_one_process, count, shared_memory=shared)
        for count, shared in itertools.product((1, 3, 7), (True, False))
    ]
    if ranks > 2:
        hosts = {3: "aab", 4: "abab"}[ranks]
        each = partial(equals_one_process, 7)
        cases.append(partial(on_hosts, hosts, each, AcrossHosts))
    run_ranks(ranks, tmp_path, *cases)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_equals_one_process_by_other_backends(ranks: int) -> None:
    run_threads(ranks, *(partial(equals_one_process, count, stage=2) for count in (1, 4, 7)))


# - Mistakes: one sentence on every rank, and no hang


def passes(params: Any, number: int) -> None:
    for k in range(number):
        backward(params, [make_grad(s, 1, k, i) for i, s in enumerate(SHAPES)])


def wrong_counts() -> None:
    """A pass too few or too many on one rank, or on all; then training goes on, zeroed or not."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    params = make_params()
    optimizer = ShardedAdaBelief(params, micro_batches=4, bucket_bytes=600, **HYPER)
    share = len(range(rank, 4, ranks))
    before = [param.detach().clone() for param in params]
    for who, more in itertools.product((0, ranks - 1, None), (-1, 1)):
        wrong = who in (rank, None)
        passes(params, share + more * wrong)
        there = who or 0
        expected = len(range(there, 4, ranks))
        sentence = (
            f"rank {there}: {expected + more} backward passes came before .* and must be "
            f"{expected}: of a step's micro_batches=4.* rank {there} of {ranks} computes"
        )
        with pytest.raises(RuntimeError, match=sentence):
            optimizer.step()
        with pytest.raises(RuntimeError, match=sentence):  # again, if it is tried again
            optimizer.step()
        if rank:  # the first has a pass in every step, which begins the next one
            optimizer.zero_grad()
        assert all(map(torch.equal, params, before))
    passes(params, share)
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def zero_grad_in_the_middle() -> None:
    """By the optimizer on one rank, or by hand; when all passes were run, the step is skipped."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    params = make_params()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = ShardedAdaBelief(params, micro_batches=2 * ranks, bucket_bytes=600, **HYPER)
    passes(params, 1)
    sentence = "rank 1: 1 backward passes came before"
    if rank == 1:
        with pytest.raises(RuntimeError, match=sentence):
            optimizer.zero_grad()
        optimizer.zero_grad()
    else:
        passes(params, 1)
        scaler.scale(torch.ones(()))
        with pytest.raises(RuntimeError, match=sentence):
            scaler.step(optimizer)  # whose scale rank 1 does not know
        optimizer.zero_grad()
    passes(params, 1)
    params[3].grad = None
    passes(params, 1)
    with pytest.raises(RuntimeError, match=r"parameter number 3 .*None or zero after 1 of .* 2"):
        optimizer.step()
    optimizer.zero_grad()
    passes(params, 2)
    optimizer.zero_grad()
    assert optimizer.skipped_steps == 1
    passes(params, 2)
    optimizer.step()
    assert optimizer.skipped_steps == 1


def steps_without_zero_grad_or_backward() -> None:
    """What a step has taken is no part of the next: zero_grad may be left out, backward may not."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with_it, without = make_params(), make_params()
    first = ShardedAdaBelief(with_it, micro_batches=ranks + 1, bucket_bytes=600, **HYPER)
    second = ShardedAdaBelief(without, micro_batches=ranks + 1, bucket_bytes=600, **HYPER)
    share = len(range(rank, ranks + 1, ranks))
    for _ in range(3):
        for params, optimizer in ((with_it, first), (without, second)):
            passes(params, share)
            optimizer.step()
        first.zero_grad()
    assert all(map(torch.equal, with_it, without))
    with pytest.raises(RuntimeError, match=f"rank 0: 0 backward passes .* must be {2}"):
        second.step()


def backward_raises() -> None:
    """On one rank, in any micro-batch: the others' step is skipped, as without the option."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    params = make_params()
    optimizer = ShardedAdaBelief(params, micro_batches=2 * ranks, bucket_bytes=600, **HYPER)

    def fail(grad: torch.Tensor) -> None:
        raise MemoryError("no room")

    for count, number in enumerate((0, 1), start=1):
        if rank == ranks - 1:
            passes(params, number)
            hook = params[0].register_hook(fail)
            with pytest.raises(MemoryError):
                passes(params, 1)
            hook.remove()
            optimizer.zero_grad()
        else:
            passes(params, 2)
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.skipped_steps == count
    passes(params, 2)
    optimizer.step()
    assert optimizer.skipped_steps == 2


def other_numbers(folder: Path) -> None:
    """A checkpoint of another number of micro-batches loads, and says what that means."""
    params = make_params()
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    optimizer = ShardedAdaBelief(named, micro_batches=3, **HYPER)
    checkpoint.save(folder, 1, optimizer=optimizer)
    assert checkpoint.load(folder, optimizer=optimizer).changes == []
    other = ShardedAdaBelief(named, micro_batches=4, **HYPER)
    (sentence,) = checkpoint.load(folder, optimizer=other).changes
    assert "micro_batches=3 and have 4 from here on" in sentence


def test_mistakes(tmp_path: Path) -> None:
    run_ranks(
        3,
        tmp_path,
        wrong_counts,
        zero_grad_in_the_middle,
        steps_without_zero_grad_or_backward,
        backward_raises,
        partial(other_numbers, tmp_path),
    )


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "8", 2**31])
def test_a_number_of_micro_batches(bad: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("micro_batches must be an integer from 1 to ")):
        ShardedAdaBelief(make_params(), micro_batches=bad)


def test_what_it_excludes() -> None:
    with pytest.raises(ValueError, match="micro_batches needs reduction='ordered'"):
        ShardedAdaBelief(make_params(), micro_batches=2, reduction="native")
    with pytest.raises(ValueError, match=r"go together with reduce_dtype=torch.int8"):
        ShardedAdaBelief(make_params(), micro_batches=2, reduce_dtype=torch.int8)


def test_gradients_that_are_put_there_are_a_micro_batch() -> None:
    params = make_params()
    optimizer = ShardedAdaBelief(params, micro_batches=1, **HYPER)
    for _ in range(2):
        before = params[0].detach().clone()
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert not torch.equal(params[0], before)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_held_is_what_stage_2_holds(stage: Any) -> None:
    held = ShardedAdaBelief(make_params(), micro_batches=2, stage=stage).bytes_per_rank()
    assert held == ShardedAdaBelief(make_params(), stage=2).bytes_per_rank()
