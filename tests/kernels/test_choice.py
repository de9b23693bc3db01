"""Which backend serves, and the line that says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from belief_dist import AdaBelief, ShardedAdaBelief, kernels
from belief_dist.operands import Operands
from belief_dist.options import DEFAULTS
from belief_dist.rule import (
    step_scalars,
)
from tests.harness.kernels import chunked, cpp

OPTIONS = {**DEFAULTS, "lr": 0.01, "eps": 1e-8, "weight_decay": 0.1}


# - The choice of a backend


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    kernels._cpp.cache_clear()
    kernels._triton.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    kernels._cpp.cache_clear()
    kernels._triton.cache_clear()


def test_the_environment_forbids_the_kernel(
    fresh_choice: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="belief_dist")
    fresh_choice.setenv("BELIEF_DIST_BACKEND", "eager")
    assert [usable for _, usable, _ in kernels.backends()] == [False, False, True]
    with pytest.raises(RuntimeError, match="BELIEF_DIST_BACKEND=eager forbids it"):
        kernels.require_fused()
    assert len(caplog.records) == 1


def test_the_environment_has_an_unknown_value(fresh_choice: pytest.MonkeyPatch) -> None:
    fresh_choice.setenv("BELIEF_DIST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be one of auto, cpp, triton, eager, got 'cuda'"):
        kernels.backends()


def test_one_line_says_what_is_used(
    fresh_choice: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="belief_dist")
    for _ in range(3):
        for update in (chunked, cpp):
            update([Operands(*(torch.rand(3) for _ in range(4)))], step_scalars(OPTIONS, 1))
    (record,) = caplog.records
    assert "C++" in record.getMessage()


def test_an_idle_core_under_torchrun_is_noticed(
    fresh_choice: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh_choice.setattr("os.sched_getaffinity", lambda process: range(8))
    fresh_choice.setattr(torch, "get_num_threads", lambda: 1)
    for ranks_here, noticed in (("2", ["OMP_NUM_THREADS=4"]), ("8", []), (None, [])):
        kernels._cpp.cache_clear()
        caplog.clear()
        if ranks_here is None:
            fresh_choice.delenv("LOCAL_WORLD_SIZE")
        else:
            fresh_choice.setenv("LOCAL_WORLD_SIZE", ranks_here)
        kernels._cpp()
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(said) == len(noticed) and all(w in s for w, s in zip(noticed, said, strict=True))


def test_an_unknown_value_is_refused_when_an_optimizer_is_built(
    fresh_choice: pytest.MonkeyPatch,
) -> None:
    fresh_choice.setenv("BELIEF_DIST_BACKEND", "nonsense")
    for kind in (AdaBelief, ShardedAdaBelief):
        with pytest.raises(ValueError, match=r"BELIEF_DIST_BACKEND must be one of .* 'nonsense'"):
            kind([torch.nn.Parameter(torch.ones(2))])
