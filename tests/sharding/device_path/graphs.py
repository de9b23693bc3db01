"""Whole iterations in a CUDA graph, which is a recording here: the bits of one by one.

The powers of these betas are exact, so that it does not matter who raises them: on a GPU they may
differ in the last place of a float64 number, see `device_scalars`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from verdicts import CASES, FORMS, SPIKE, assert_same, build, held, params_of

from belief_dist import ShardedAdaBelief
from belief_dist.sharding import spike_guard
from tests.harness.replay import recording

EXACT: dict[str, Any] = {"betas": (0.5, 0.75), "lr": 0.0625}


class Training:
    """Iterations with the gradients of a seed, in a graph or one by one."""

    def __init__(self, ranks: int = 1, **options: Any) -> None:
        self.optimizer: ShardedAdaBelief = build(ranks, **{**EXACT, **options})
        self._params = params_of(self.optimizer)
        # Where the input of a graph lies.
        self._input = [torch.zeros_like(param) for param in self._params]

    def fill(self, seed: int | None) -> None:
        """Put in what the next iteration takes; None is not finite, from SPIKE on it is large."""
        generator = torch.Generator().manual_seed(seed or 0)
        for place in self._input:
            place.copy_(torch.randn(place.shape, generator=generator))
        if seed is None:
            self._input[1].fill_(torch.nan)
        elif seed >= SPIKE:
            self._input[1].mul_(1e4)

    def iterate(self) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(self._params, [place * 1 for place in self._input])
        self.optimizer.step()

    def run(self, *seeds: int | None) -> None:
        for seed in seeds:
            self.fill(seed)
            self.iterate()

    def capture(self, seed: int | None) -> None:
        """Capture an iteration, and replay it once."""
        self.optimizer.wait_pending()
        self.optimizer.zero_grad()
        self.fill(seed)
        with recording() as self.graph:
            self.iterate()

    def replay(self, *seeds: int | None) -> None:
        for seed in seeds:
            self.fill(seed)
            self.graph.replay()

    def result(self) -> list[Any]:
        self.optimizer.wait_pending()
        return held(self.optimizer)


@pytest.mark.parametrize(("ranks", "form"), CASES, ids=str)
def test_replays_are_steps(ranks: int, form: dict[str, Any]) -> None:
    captured, plain = Training(ranks, **form), Training(ranks, **form)
    captured.run(1, 2)
    captured.capture(3)
    captured.replay(4, 5)
    plain.run(1, 2, 3, 4, 5)
    assert_same(captured.result(), plain.result())
    assert torch.equal(captured.optimizer.grad_norm, plain.optimizer.grad_norm)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_skips_and_steps_outside_between_replays(form: dict[str, Any]) -> None:
    captured, plain = Training(**form), Training(**form)
    captured.run(1)
    captured.capture(2)
    captured.replay(None, 3)
    captured.run(4, None)
    captured.replay(5)
    assert captured.optimizer.skipped_steps == 2
    captured.replay(None, 6)
    captured.run(7)
    captured.replay(8)
    plain.run(1, 2, 3, 4, 5, 6, 7, 8)
    assert_same(captured.result(), plain.result())
    assert (captured.optimizer.skipped_steps, plain.optimizer.skipped_steps) == (3, 0)


def test_spikes_in_replays_and_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The history is that of replays and of steps outside, and of nothing that was skipped."""
    few, most = 5, 2  # steps take long in the interpreter
    monkeypatch.setattr(spike_guard, "FEWEST", few)
    monkeypatch.setattr(spike_guard, "MOST_IN_A_ROW", most)
    captured, plain = Training(spike_guard=3.0), Training(spike_guard=3.0)
    captured.run(1)
    captured.capture(2)
    captured.replay(*range(3, few), SPIKE)  # which is taken: too few steps before
    captured.replay(SPIKE, 40, None, SPIKE)
    captured.run(41, SPIKE)
    captured.replay(42)
    plain.run(*range(1, few), SPIKE, 40, 41, 42)
    assert captured.optimizer.spike_history == plain.optimizer.spike_history
    assert_same(captured.result(), plain.result())
    assert (captured.optimizer.skipped_steps, plain.optimizer.skipped_steps) == (4, 0)
    captured.replay(*[SPIKE] * most)
    assert captured.optimizer.skipped_steps == 4 + most
    captured.replay(SPIKE, SPIKE)
    plain.run(*[SPIKE] * (most + 2))
    assert captured.optimizer.spike_history == plain.optimizer.spike_history
    assert len(plain.optimizer.spike_history) == 1 + 2
    assert_same(captured.result(), plain.result())


@pytest.mark.parametrize("ranks", [1, 8])
def test_a_learning_rate_that_changes_between_replays(ranks: int) -> None:
    lr = torch.tensor(0.0625)
    captured, plain = Training(ranks, lr=lr), Training(ranks)
    captured.run(1)
    captured.capture(2)
    plain.run(1, 2)
    for number, seed in enumerate((3, 4, 5)):
        rate = 2.0 ** -(number + 5)
        lr.fill_(rate)
        for group in plain.optimizer.param_groups:
            group["lr"] = rate
        captured.replay(seed)
        plain.run(seed)
    assert_same(captured.result(), plain.result())


def test_a_state_dict_knows_of_replays() -> None:
    captured, plain = Training(), Training()
    captured.run(1)
    captured.capture(2)
    captured.replay(3, None)
    plain.run(1, 2, 3, None)
    ours, theirs = (copy.deepcopy(each.optimizer.state_dict()) for each in (captured, plain))
    assert ours["sharding"] == theirs["sharding"]
    for index, state in theirs["state"].items():
        assert state["step"] == 3
        assert_same(list(ours["state"][index].values()), list(state.values()))
    captured.replay(4)
    plain.run(4)
    assert_same(captured.result(), plain.result())


def test_a_step_outside_that_is_skipped_counts_nowhere() -> None:
    """Neither for who reads the counts right after it, nor for the step outside that follows."""
    captured, plain = Training(), Training()
    captured.run(1)
    captured.capture(2)
    captured.run(3, None)
    plain.run(1, 2, 3)
    steps = [state["step"] for state in captured.optimizer.state_dict()["state"].values()]
    assert set(steps) == {3} and captured.optimizer.skipped_steps == 1
    captured.run(None, 4, 5)
    plain.run(4, 5)
    assert_same(captured.result(), plain.result())


def test_a_fault_in_a_replay_is_raised_at_the_next_read() -> None:
    captured = Training(dtype=torch.bfloat16)
    captured.run(1)
    captured.capture(2)
    before = captured.result()
    params_of(captured.optimizer)[0].data.add_(1)
    captured.replay(3)
    with pytest.raises(RuntimeError, match=r"changed through `\.data`"):
        captured.optimizer.skipped_steps  # noqa: B018
    assert captured.optimizer.skipped_steps == 0
    states = [x for x in held(captured.optimizer)[1:] if isinstance(x, int)]
    assert states == [x for x in before if isinstance(x, int)] == [2, 2, 2]


def test_the_recording_reads_its_memory_again() -> None:
    """That a replay here is one: it takes what the memory holds, and runs no Python."""
    place, seen = torch.ones(3), []
    with recording() as graph:
        doubled: Tensor = place * 2
        doubled.add_(1)
        seen.append(1)
    place.fill_(5)
    graph.replay()
    assert doubled.tolist() == [11, 11, 11] and len(seen) == 1
