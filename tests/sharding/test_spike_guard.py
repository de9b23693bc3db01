"""A step whose gradient is far larger than those before is skipped by all ranks, and no other."""

from __future__ import annotations

import copy
import math
import re
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from belief_dist import ShardedAdaBelief, checkpoint
from belief_dist.sharding.spike_guard import FEWEST, MOST_IN_A_ROW, WINDOW, SpikeGuard
from belief_dist.sharding.step_consensus import Verdict
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import backward

CPU = torch.device("cpu")
FORMS: list[dict[str, Any]] = [
    {},
    {"stage": 2, "max_grad_norm": 1.0},
    {"dtype": torch.bfloat16, "offload": "cpu"},
    {
        "dtype": torch.bfloat16,
        "stage": 2,
        "master": "remainder",
        "state_dtype": torch.uint8,
        "check_states": True,
    },
    {"micro_batches": 6},
    {"reduce_dtype": torch.int8},
    {"shared_memory": False, "overlap": False},
]


class Run:
    """A small training whose steps may be spikes, or have gradients that are not finite."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.params = make_params(dtype)
        options = {"spike_guard": 4.0, "bucket_bytes": 1500, **HYPER, **options}
        named = [(f"p{index}", param) for index, param in enumerate(self.params)]
        self.optimizer = ShardedAdaBelief(named, **options)

    def step(self, number: int, factor: float = 1.0) -> None:
        """Take a step; its gradients are `factor` times as large, on the last rank alone."""
        ranks, rank = self.optimizer.comm.world_size, self.optimizer.comm.rank
        count = self.optimizer.options.micro_batches
        for micro in range(rank, count or ranks, ranks):
            grads = [make_grad(s, number, 0, i, micro) for i, s in enumerate(SHAPES)]
            if micro == (count or ranks) - 1:
                grads = [grad * factor for grad in grads]
            backward(self.params, [g.to(self.params[0].dtype) for g in grads])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, *numbers: int) -> None:
        for number in numbers:
            self.step(number)

    def held(self) -> list[Any]:
        """Return all that a step changes."""
        self.optimizer.wait_pending()
        states = [self.optimizer.state[param] for param in self.params]
        # What int8 has cut off is forgotten with a step that is skipped.
        kept = [state[key] for state in states for key in sorted(state) if key != "wire_error"]
        return copy.deepcopy([[param.detach() for param in self.params], kept])

    @property
    def module(self) -> nn.Module:
        module = nn.Module()
        for index, param in enumerate(self.params):
            module.register_parameter(f"p{index}", param)
        return module


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for mine, its in zip(ours, theirs, strict=True)
        for a, b in zip(mine, its, strict=True)
    )


NORMAL = range(1, FEWEST + 1)


def is_skipped(form: dict[str, Any], late: bool) -> None:
    """Nothing has changed after it, and all that follows is as if it had not been."""
    run, undisturbed = Run(**form), Run(**form)
    run.optimizer._engine.consensus.defers = late
    run.steps(*NORMAL)
    undisturbed.steps(*NORMAL)
    before, history = run.held(), run.optimizer.spike_history
    assert len(history) == 1 + FEWEST and history[0] == 0
    level = median_high(history[1:])
    run.step(99, 1e4)
    assert same(before, run.held())
    assert run.optimizer.skipped_steps == 1
    assert run.optimizer.last_step == (
        FEWEST + 1,
        False,
        f"the gradient's norm is {run.optimizer.grad_norm.item():.4g}, and more than "
        f"{4.0 * level:.4g}, which is spike_guard=4 times the median of the steps before",
    )
    assert run.optimizer.spike_history == [1.0, *history[1:]]
    if form.get("reduce_dtype") != torch.int8:
        run.steps(100, 101)
        undisturbed.steps(100, 101)
        assert same(undisturbed.held(), run.held())
        assert run.optimizer.spike_history == undisturbed.optimizer.spike_history
    assert run.optimizer.skipped_steps == 1


def nothing_is_one_before_enough_steps() -> None:
    run = Run()
    for number in NORMAL:
        run.step(number, 1e4 if number in (20, FEWEST) else 1.0)
    assert run.optimizer.skipped_steps == 0
    run.step(99, 1e4)
    assert run.optimizer.skipped_steps == 1


def a_new_level_is_accepted() -> None:
    """After so many in a row the next is taken; one that is not finite does not break a row."""
    run = Run()
    run.steps(*NORMAL)
    before = run.held()
    for number in range(MOST_IN_A_ROW):
        run.step(100 + number, math.nan if number == 3 else 1e4)
    run.step(200, 1e4)
    assert run.optimizer.skipped_steps == MOST_IN_A_ROW + 1
    assert same(before, run.held())
    for number in range(FEWEST):
        run.step(300 + number, 1e4)
        assert run.optimizer.last_step.was_taken
        assert len(run.optimizer.spike_history) == 2 + number
    run.step(400, 1e9)
    assert not run.optimizer.last_step.was_taken


def goes_on_after_a_load(folder: Path, form: dict[str, Any]) -> None:
    """With the history that was saved, by either way to save; without the option it is empty."""
    run = Run(**form)
    run.steps(*NORMAL)
    for number in range(3):
        run.step(100 + number, 1e4)
    checkpoint.save(folder, 1, model=run.module, optimizer=run.optimizer)
    shard, weights = copy.deepcopy((run.optimizer.state_dict(), run.module.state_dict()))
    assert shard["sharding"]["spike_history"] == run.optimizer.spike_history
    again, by_shard, off = Run(**form), Run(**form), Run(**form, spike_guard=None)
    for other in (again, by_shard):
        other.steps(7, 8)  # a history of its own
    checkpoint.load(folder, model=again.module, optimizer=again.optimizer)
    by_shard.module.load_state_dict(weights)
    by_shard.optimizer.load_state_dict(shard)
    checkpoint.load(folder, model=off.module, optimizer=off.optimizer)
    assert off.optimizer.spike_history == off.optimizer.state_dict()["sharding"]["spike_history"]
    assert off.optimizer.spike_history == []
    for each in (run, again, by_shard):
        for number in range(MOST_IN_A_ROW - 3):
            each.step(200 + number, 1e4)
            assert not each.optimizer.last_step.was_taken
        each.step(300, 1e4)
        assert each.optimizer.last_step.was_taken
        assert each.optimizer.skipped_steps == MOST_IN_A_ROW
    for other in (again, by_shard):
        assert same(run.held(), other.held())
        assert run.optimizer.spike_history == other.optimizer.spike_history


def older_shards_begin_anew(folder: Path) -> None:
    run = Run()
    run.steps(*NORMAL)
    shard = copy.deepcopy(run.optimizer.state_dict())
    for damage in ([1.0, math.nan], [0.0, -1.0], ["0"], None):
        damaged = {**shard, "sharding": {**shard["sharding"], "spike_history": damage}}
        with pytest.raises(ValueError, match="the shard is damaged, its spike_history is"):
            run.optimizer.load_state_dict(damaged)
    del shard["sharding"]["spike_history"]
    run.optimizer.load_state_dict(shard)
    assert run.optimizer.spike_history == []


def histories_that_differ_are_an_error() -> None:
    """Ranks that would decide differently are told before anything is updated."""
    run = Run()
    run.steps(*NORMAL)
    before = run.held()
    if run.optimizer.comm.rank == 1:
        history = run.optimizer.spike_history
        run.optimizer._engine.spikes.restore([*history[:5], history[5] * 2, *history[6:]])
    sentence = "ranks disagree about the spikes in a row, and norms of the steps before"
    with pytest.raises(ValueError, match=sentence):
        run.step(99)
    assert same(before, run.held())


def without_a_spike_it_changes_no_bit(form: dict[str, Any]) -> None:
    """And nothing that is sent: as many messages of the same lengths."""
    sent: list[list[int]] = []
    runs = Run(**form), Run(**form, spike_guard=None)
    for run in runs:
        sent.append([])
        run.steps(1)
        comm, lengths = run.optimizer.comm, sent[-1]
        sum_ = comm.sum_
        with mock.patch.object(comm, "sum_", lambda t: (lengths.append(t.numel()), sum_(t))):  # noqa: B023
            run.steps(*NORMAL[1:], *range(50, 60))
        assert run.optimizer.skipped_steps == 0
    assert same(*(run.held() for run in runs))
    assert sent[0] == sent[1] and sent[0]


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop:FutureWarning")
def a_grad_scaler_keeps_its_scale() -> None:
    """A spike is no overflow; and what is compared is the gradient without the scale."""
    run = Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=FEWEST - 2)
    scaler.scale(torch.zeros(()))

    def step(number: int, factor: float = 1.0) -> float:
        scale = scaler.get_scale()
        grads = [make_grad(s, number, 0, i) * factor * scale for i, s in enumerate(SHAPES)]
        backward(run.params, list(grads))
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        return float(scaler.get_scale())

    found = [step(number) for number in NORMAL]
    assert found[-1] == 2048.0 and run.optimizer.skipped_steps == 0
    before = run.held()
    assert step(99, 1e4) == 2048.0 and run.optimizer.skipped_steps == 1
    assert same(before, run.held())
    assert step(99, math.inf) == 1024.0
    assert step(98) == 1024.0 and run.optimizer.last_step.was_taken


def test_on_three_ranks(tmp_path: Path) -> None:
    run_ranks(
        3,
        tmp_path,
        *(partial(is_skipped, form, False) for form in FORMS),
        *(partial(is_skipped, form, True) for form in FORMS if not form.get("offload")),
        *(partial(without_a_spike_it_changes_no_bit, form) for form in FORMS),
        *(
            partial(goes_on_after_a_load, tmp_path / str(number), form)
            for number, form in enumerate((FORMS[0], FORMS[3]))
        ),
        partial(older_shards_begin_anew, tmp_path),
        nothing_is_one_before_enough_steps,
        a_new_level_is_accepted,
        histories_that_differ_are_an_error,
        a_grad_scaler_keeps_its_scale,
    )


def on_a_mesh() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    run, undisturbed = Run(process_group=mesh), Run(process_group=mesh)
    run.steps(*NORMAL)
    run.step(99, 1e4)
    undisturbed.steps(*NORMAL)
    assert run.optimizer.skipped_steps == 1
    assert same(run.held(), undisturbed.held())


def test_with_copies_of_all_shards(tmp_path: Path) -> None:
    run_ranks(4, tmp_path, on_a_mesh)


def saves_its_end(path: Path) -> None:
    """Train with spikes, one part of it resumed."""
    run = Run(micro_batches=6)
    spikes = [40, 45, *range(50, 62)]
    for number in range(1, 80):
        run.step(number, 1e4 if number in spikes else 1.0)
        if number == 55:
            checkpoint.save(path / "run", 55, model=run.module, optimizer=run.optimizer)
            run = Run(micro_batches=6)
            checkpoint.load(path / "run", model=run.module, optimizer=run.optimizer)
    ended = [
        [param.detach() for param in run.params],
        run.optimizer.spike_history,
        run.optimizer.skipped_steps,
        run.optimizer.grad_norm,
    ]
    if run.optimizer.comm.rank == 0:
        torch.save(ended, path / "end.pt")


def test_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run_ranks(ranks, tmp_path, partial(saves_its_end, folder))
        found.append(torch.load(folder / "end.pt"))
    params, history, skipped, norm = found[0]
    assert skipped == 2 + MOST_IN_A_ROW and history[0] == 0
    for other in found[1:]:
        assert all(map(torch.equal, params, other[0]))
        assert (history, skipped, norm) == (other[1], other[2], other[3])


def test_one_rank_alone(caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    run.steps(*NORMAL)
    before = run.held()
    run.step(99, 1e4)
    assert same(before, run.held())
    assert re.search(
        r"spike_guard=4 times the median of the steps before: step skipped on all ranks \(1 so",
        caplog.text,
    )


# - The rule by itself


def by_the_book(steps: list[tuple[float, bool]], factor: float) -> list[bool]:
    """Return which steps are spikes; of each, norm and whether it would be taken."""
    norms: list[float] = []
    in_a_row, found = 0, []
    for norm, updates in steps:
        recent = norms[-WINDOW:]
        level = median_high(recent) if recent else 0.0
        is_high = len(recent) >= FEWEST and level > 0 and norm > factor * level
        found.append(updates and is_high and in_a_row < MOST_IN_A_ROW)
        if found[-1]:
            in_a_row += 1
        elif updates:
            norms = [norm] if is_high else [*norms, norm]
            in_a_row = 0
    return found


@settings(deadline=None)  # what an example takes is the machine's affair
@given(st.randoms(use_true_random=False), st.sampled_from([1.5, 4.0]), st.integers(0, 300))
def test_the_rule(random: Any, factor: float, count: int) -> None:
    level, steps = 1.0, []
    for _ in range(count):
        if random.random() < 0.02:
            level = random.choice([0.0, 1.0, 3.0, 100.0])
        norm = level * random.choice([0.5, 1.0, 1.0, 1.4, 5.0])
        steps.append((norm, random.random() < 0.9))
    guard, found = SpikeGuard(factor, CPU), []
    for norm, updates in steps:
        known = torch.tensor(Verdict.UPDATE if updates else Verdict.NOT_FINITE)
        verdict = guard.judge(torch.tensor(norm, dtype=torch.float64), known)
        assert verdict in (known, Verdict.SPIKE)
        found.append(bool(verdict == Verdict.SPIKE))
        if random.random() < 0.05:
            kept, guard = guard.history(), SpikeGuard(factor, CPU)
            guard.restore(kept)
            assert guard.history() == kept
    assert found == by_the_book(steps, factor)


@pytest.mark.parametrize("wrong", [1.0, 0, -3, math.inf, math.nan])
def test_a_factor_that_makes_no_sense(wrong: float) -> None:
    with pytest.raises(ValueError, match="spike_guard must be > 1 and finite, or None"):
        ShardedAdaBelief([nn.Parameter(torch.zeros(3))], spike_guard=wrong)
