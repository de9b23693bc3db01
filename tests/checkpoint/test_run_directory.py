"""A kill at any moment leaves the checkpoint; which ones are kept depends on no clock."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from belief_dist import AdaBelief, checkpoint
from belief_dist.checkpoint import run_directory


def save(run: Path, step: int, value: float = 1.0, keep: int | None = None) -> None:
    model = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(model.weight, value)
    optimizer = AdaBelief(model.named_parameters())
    checkpoint.save(run, step, model=model, optimizer=optimizer, keep=keep)


def loaded(run: Path, step: int | None = None) -> tuple[int, float]:
    model = torch.nn.Linear(4, 4)
    found = checkpoint.load(run, step=step, model=model)
    return found.step, float(model.weight.detach()[0, 0])


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name.startswith("step-"))


@pytest.mark.parametrize("renames", [1, 2, 3])
@pytest.mark.parametrize("keep", [None, 1])
def test_a_step_saved_again_and_killed(renames: int, keep: int | None, tmp_path: Path) -> None:
    """After each rename of a save that replaces its own step, one of the two copies loads."""
    save(tmp_path, 5)
    child = os.fork()
    if child == 0:
        done = 0
        rename, replace = os.rename, os.replace

        def killed(real):  # type: ignore[no-untyped-def]
            def call(*paths):  # type: ignore[no-untyped-def]
                nonlocal done
                real(*paths)
                done += 1
                if done == renames:
                    os.kill(os.getpid(), signal.SIGKILL)

            return call

        # DCP renames its own file first.
        run_directory.os.rename = killed(rename)  # type: ignore[attr-defined]
        run_directory.os.replace = killed(replace)  # type: ignore[attr-defined]
        save(tmp_path, 5, 2.0, keep)
        os._exit(0)
    os.waitpid(child, 0)
    step, value = loaded(tmp_path)
    assert step == 5 and value in (1.0, 2.0)
    assert loaded(tmp_path, 5) == (step, value)
    assert checkpoint.verify(tmp_path).exists()
    save(tmp_path, 6, 3.0)
    assert loaded(tmp_path) == (6, 3.0)
    assert loaded(tmp_path, 5) == (step, value)  # was not taken for a leftover
    save(tmp_path, 5, 4.0)
    save(tmp_path, 7)
    assert loaded(tmp_path, 5) == (5, 4.0)
    assert names(tmp_path) == ["step-00000005", "step-00000006", "step-00000007"]
    assert not list(tmp_path.glob(".replaced-*"))


def test_what_is_kept_depends_on_the_order_of_saving(tmp_path: Path) -> None:
    """Neither on a clock that was ahead, nor on the times that a copy gives to files."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
        manifest = tmp_path / f"step-{step:08d}" / "manifest.json"
        os.utime(manifest, (time.time() + 7200,) * 2)
    for step in (4, 5, 2):  # a run that went back to step 1
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in reversed(names(tmp_path)):
        shutil.copytree(tmp_path / name, copy / name, copy_function=shutil.copyfile)
        time.sleep(0.01)
    save(copy, 6, keep=2)
    assert names(copy) == ["step-00000002", "step-00000006"]


def test_checkpoints_of_an_earlier_version_are_kept_by_their_times(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
        manifest = tmp_path / f"step-{step:08d}" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"serial"', '"other"'))
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_steps_are_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_001):
        save(tmp_path, step)
    (tmp_path / "latest").unlink()
    assert loaded(tmp_path)[0] == 100_000_001
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert loaded(tmp_path)[0] == 100_000_001
    (tmp_path / "latest").write_text("../elsewhere")
    assert loaded(tmp_path)[0] == 100_000_001


def begin_and_die(run: Path) -> Path:
    """Begin to save in a process that is killed then."""
    child = os.fork()
    if child == 0:
        run_directory.begin(run, 7)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = (path for path in run.iterdir() if path.is_dir())
    return left


def test_two_jobs_in_one_folder_leave_each_other_alone(tmp_path: Path) -> None:
    """Started twice by mistake: neither loses what it is writing, nor its checkpoints."""
    ours = run_directory.begin(tmp_path, 1)
    (ours / "data").write_text("half of it")
    child = os.fork()  # another job
    if child == 0:
        try:
            save(tmp_path, 2, value=2.0)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0 and (ours / "data").read_text() == "half of it"
    assert loaded(tmp_path) == (2, 2.0)
    run_directory.give_up(ours)
    save(tmp_path, 3)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_a_killed_job_was_writing_is_removed(tmp_path: Path) -> None:
    left = begin_and_die(tmp_path)
    assert left.exists()
    save(tmp_path, 8)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_leftovers_of_an_earlier_version_have_no_lock(tmp_path: Path) -> None:
    (tmp_path / ".saving-step-00000004-0123abcd").mkdir()
    save(tmp_path, 8)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
