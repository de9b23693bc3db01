"""What tests stand on: a failing rank says what it ran, and every rank begins afresh."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness.ranks import describe, run_ranks


def fails_on(rank: int, values: list[int], **more: object) -> None:
    assert dist.get_rank() != rank, "as it shall"


def begins_afresh(variable: str) -> None:
    """The process that this one is a fork of has no thread that would be lost."""
    assert os.environ["BELIEF_DIST_TEST"] == variable
    status = Path(f"/proc/{os.getppid()}/status").read_text()
    assert "\nThreads:\t1\n" in status
    assert not hasattr(torch, "belief_dist_test")
    torch.belief_dist_test = True


def test_a_failing_rank_says_with_what_arguments(tmp_path: Path) -> None:
    case = partial(fails_on, 1, list(range(1000)), dtype=torch.bfloat16, options={"amsgrad": True})
    with pytest.raises(Exception) as caught:
        run_ranks(3, tmp_path, partial(fails_on, -1, []), case)
    said = str(caught.value)
    assert (
        "rank 1, fails_on(1, [0, 1, 2, 3, 4, 5, 6, 7, ...], dtype=torch.bfloat16, "
        "options={'amsgrad': True}):\nTraceback"
    ) in said
    assert "as it shall" in said


def test_a_case_is_described_in_a_line() -> None:
    assert describe(begins_afresh) == "begins_afresh"
    nested = partial(partial(fails_on, 7), text="x" * 1000)
    assert describe(nested).startswith("fails_on(7, text='xxx")
    assert len(describe(nested)) < 150


def test_every_rank_begins_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", "second"):
        monkeypatch.setenv("BELIEF_DIST_TEST", value)
        run_ranks(2, tmp_path, partial(begins_afresh, value))
