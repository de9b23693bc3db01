"""Saves in the background: of the moment of the call, one at a time, failures on all ranks."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from belief_dist import AdaBelief, checkpoint
from belief_dist.checkpoint import async_save, checksummed_files
from belief_dist.checkpoint.async_save import Staging
from tests.harness.checkpoints import Odd, build, compare, everything, train
from tests.harness.ranks import run_ranks


def trains_on(run: Path, options: dict[str, Any]) -> None:
    """What is saved is the state of the call, whatever training does meanwhile."""
    gate = threading.Event()
    original = checksummed_files._ChecksumStream.write

    def slow(self: Any, data: Any) -> int:
        assert gate.wait(30)
        return original(self, data)

    checksummed_files._ChecksumStream.write = slow  # type: ignore[method-assign]
    try:
        model, optimizer = build(**options)
        train(model, optimizer, range(3))
        with checkpoint.BackgroundSaver(run, model=model, optimizer=optimizer, keep=1) as saver:
            before = everything(model, optimizer)
            train(model, optimizer, range(3, 4))  # its gathers are under way
            blocked = saver.save(4, extra={"epoch": 1})
            at_call = everything(model, optimizer)
            train(model, optimizer, range(4, 6))
            assert not list(run.glob("step-*"))  # training did not wait
            gate.set()
            saved = saver.wait()
            assert saved is not None and saved.blocked == blocked < saved.seconds
            saver.save(6)  # in the memory of the first
            later = everything(model, optimizer)
            train(model, optimizer, range(6, 7))
    finally:
        checksummed_files._ChecksumStream.write = original  # type: ignore[method-assign]
    assert sorted(p.name for p in run.iterdir()) == ["latest", "step-00000006"]
    other, other_optimizer = build(seed=4, **options)
    checkpoint.load(run, model=other, optimizer=other_optimizer)
    compare(everything(other, other_optimizer), later, "in the background")
    del before, at_call


def fails_together(run: Path) -> None:
    """One rank's disk is full: every rank has the error in the same step, and the old files."""
    rank = dist.get_rank()
    model, optimizer = build()
    train(model, optimizer, range(2))
    saver = checkpoint.BackgroundSaver(run, model=model, optimizer=optimizer)
    saver.save(2)
    saver.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    saver.save(3)
    raised = None
    for step in range(2, 400):
        try:
            train(model, optimizer, range(step, step + 1))
        except checkpoint.CheckpointError as error:
            assert "cannot save step 3" in str(error) and "rank 1: " in str(error)
            assert "File too large" in str(error)
            raised = step
            break
        time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised is not None and set(optimizer.comm.exchange(raised)) == {raised}
    optimizer.zero_grad()
    train(model, optimizer, range(1))  # goes on
    assert sorted(p.name for p in run.iterdir()) == ["latest", "step-00000002"]
    assert checkpoint.load(run, model=model, optimizer=optimizer).step == 2
    saver.save(5)
    closed = saver.close()
    assert closed is not None and closed.step == 5


def leaves_a_stopped_rank(run: Path) -> None:
    """An exception ends the block soon, although a rank's writing thread has stopped."""
    rank = dist.get_rank()
    model, optimizer = build()
    train(model, optimizer, range(2))
    gate = threading.Event()
    write_item = checksummed_files._write_item

    def waits(*arguments: Any) -> None:
        assert rank == 0 or gate.wait(60)
        write_item(*arguments)

    checksummed_files._write_item = waits
    async_save.STILL_SECONDS = 1.0
    begin = time.monotonic()
    error = ZeroDivisionError("of the script")
    with pytest.raises(ZeroDivisionError) as raised:
        with checkpoint.BackgroundSaver(run, model=model, optimizer=optimizer) as saver:
            saver.save(2)
            raise error
    assert raised.value is error and time.monotonic() - begin < 30
    if sys.version_info >= (3, 11):
        assert "the save of step 2 in the background was given up" in error.__notes__[0]
    dist.barrier()
    gate.set()  # it goes on, and nobody has made the others' threads fail
    while not (run / "latest").exists():
        time.sleep(0.05)
    checksummed_files._write_item = write_item


def test_in_the_background_of_several_ranks(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in "abc"]
    run_ranks(
        3,
        tmp_path,
        partial(trains_on, runs[0], {}),
        partial(trains_on, runs[1], {"dtype": torch.bfloat16, "master": "remainder", "stage": 2}),
        partial(fails_together, runs[2]),
    )


def test_an_exception_does_not_wait_for_a_stopped_rank(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, partial(leaves_a_stopped_rank, tmp_path / "run"))


def test_an_exception_waits_for_a_save_that_moves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint before an error is worth the seconds that it takes."""
    monkeypatch.setattr(async_save, "STILL_SECONDS", 1.0)
    write_item = checksummed_files._write_item

    def slow(*arguments: Any) -> None:
        time.sleep(0.15)
        write_item(*arguments)

    monkeypatch.setattr(checksummed_files, "_write_item", slow)
    model, optimizer = build()
    with pytest.raises(ZeroDivisionError) as raised:
        with checkpoint.BackgroundSaver(tmp_path, model=model, optimizer=optimizer) as saver:
            saver.save(2)
            raise ZeroDivisionError
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert not getattr(raised.value, "__notes__", [])


def test_in_the_background_of_one_process(tmp_path: Path) -> None:
    trains_on(tmp_path, {})


def test_arguments_and_errors(tmp_path: Path) -> None:
    model, optimizer = build()
    with checkpoint.BackgroundSaver(tmp_path, model=model, optimizer=optimizer) as saver:
        with pytest.raises(checkpoint.CheckpointError, match="step must be an integer >= 0"):
            saver.save(-1)
        saver.save(1)
        assert saver.wait() is not None
        with pytest.raises(ZeroDivisionError):
            with saver:
                raise ZeroDivisionError


def test_what_all_ranks_hold_is_copied_once() -> None:
    """Under DDP every rank holds everything, and copies its share; buffers are the first one's."""

    class Team:
        world_size = 2
        rank = 0

    model = Odd(torch.float32, 0)
    optimizer = AdaBelief(model.named_parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    shares = []
    for rank in range(2):
        team: Any = Team()
        team.rank = rank
        entries = checkpoint.contents(model, optimizer, has_buffers=rank == 0)
        shares.append(Staging().stage(entries, team))
    assert {*shares[0], *shares[1]} == set(checkpoint.contents(model, optimizer))
    assert {"model.mean", "model.count"} <= {*shares[0]}
    assert {*shares[0]} & {*shares[1]} == {"belief_dist", "extra"}


LAST_SAVE = """
import sys, torch
from belief_dist import AdaBelief, checkpoint
from belief_dist.checkpoint import checksummed_files
def full(*arguments):
    raise OSError(28, "No space left on device")
checksummed_files._write_item = full
model = torch.nn.Linear(4, 4)
optimizer = AdaBelief(model.named_parameters())
saver = checkpoint.BackgroundSaver(sys.argv[1], model=model, optimizer=optimizer)
saver.save(3)
"""


STOPPED = """
import sys, threading, torch
from belief_dist import AdaBelief, checkpoint
from belief_dist.checkpoint import async_save, checksummed_files
async_save.STILL_SECONDS = 0.5
checksummed_files._write_item = lambda *_: threading.Event().wait()
model = torch.nn.Linear(4, 4)
optimizer = AdaBelief(model.named_parameters())
with checkpoint.BackgroundSaver(sys.argv[1], model=model, optimizer=optimizer) as saver:
    saver.save(3)
    raise KeyError("of the script")
"""


def test_a_process_ends_although_its_save_was_given_up(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 1 and "KeyError: 'of the script'" in done.stderr
    assert "the save of step 3 in the background was given up" in done.stderr


def test_a_script_that_ends_says_that_its_last_save_failed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAST_SAVE, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "step 3 could not be saved in the background: cannot save step 3 to" in done.stderr
    assert "No space left on device" in done.stderr
