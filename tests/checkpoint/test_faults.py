"""What goes wrong with checkpoints: one clear error on every rank, and nothing half done."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from belief_dist import ShardedAdaBelief, checkpoint
from belief_dist.checkpoint import CheckpointError
from tests.harness.checkpoints import Odd, build, compare, everything, groups, train
from tests.harness.threads import run_threads


def save(run: Path, step: int = 3, **options: Any) -> None:
    model, optimizer = build()
    train(model, optimizer, range(step))
    checkpoint.save(run, step, model=model, optimizer=optimizer, **options)


def is_refused(run: Path, sentence: str, **options: Any) -> None:
    """Every rank has the same error, and what it has is as it was."""
    model, optimizer = build(seed=4)
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        checkpoint.load(run, model=model, optimizer=optimizer, **options)
    assert len(set(optimizer.comm.exchange(str(caught.value)))) == 1
    compare(everything(model, optimizer), before, "after an error")


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__2_0.distcp", ".metadata"])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove, "file .*{name} is missing"),
        (truncate, r"file .*{name} has \d+ bytes, and \d+ were written"),
        (flip, "file .*{name} has changed since it was written: its CRC-32 is"),
    ],
)
def test_damaged_files(
    tmp_path: Path, name: str, damage: Callable[[Path], None], sentence: str
) -> None:
    run_threads(3, partial(save, tmp_path))
    damage(tmp_path / "step-00000003" / name)
    run_threads(2, partial(is_refused, tmp_path, sentence.format(name=name)))
    with pytest.raises(ValueError, match=sentence.format(name=name)):
        checkpoint.verify(tmp_path)


def test_a_damaged_manifest(tmp_path: Path) -> None:
    run_threads(1, partial(save, tmp_path))
    manifest = tmp_path / "step-00000003" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    run_threads(2, partial(is_refused, tmp_path, "manifest.json is damaged: JSONDecodeError"))
    manifest.unlink()
    run_threads(2, partial(is_refused, tmp_path, f"there is no checkpoint in {tmp_path}"))
    nowhere = tmp_path / "nowhere"
    run_threads(2, partial(is_refused, nowhere, f"there is no checkpoint in {nowhere}"))
    other = r"has no checkpoint of step 9; it has \[\]"
    run_threads(2, partial(is_refused, tmp_path, other, step=9))


class Other(Odd):
    """Odd, with one difference."""

    def __init__(self, change: str) -> None:
        super().__init__(torch.float32, 0)
        if change == "more":
            self.extra = nn.Parameter(torch.zeros(3))
        if change == "less":
            del self.scalar
        if change == "shape":
            self.norm = nn.Parameter(torch.zeros(130))
        if change == "buffer":
            self.register_buffer("variance", torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("more", "it has no parameter 'extra', which the optimizer has"),
        ("less", "it has parameter 'scalar', which the optimizer does not have"),
        ("shape", r"shape of 'model.norm' is \(129,\) in it, and parameter 'norm' has \(130,\)"),
        ("buffer", "it has no 'variance', which the model has"),
        ("groups", "'norm' and 'empty' are both in param group 0, but were saved with"),
        ("amsgrad", "'empty' was saved with amsgrad=False, and param group 0 has amsgrad"),
        ("scaler", "it holds no loss scale; leave out scaler"),
        ("nameless", "parameter number 0 has no name, under which a checkpoint could hold it"),
        ("stranger", "number 0, of shape .*, is not in the model"),
    ],
)
def test_a_checkpoint_of_another_model(tmp_path: Path, change: str, sentence: str) -> None:
    def load() -> None:
        model: Any = Other(change)
        params: Any = list(model.named_parameters())
        if change == "nameless":
            params = list(model.parameters())
        if change not in ("groups", "nameless"):
            params = [{"params": params[:1]}, {"params": params[1:], "betas": (0.7, 0.9)}]
            if change != "less":
                params = groups(model)
                named = dict(model.named_parameters())
                params[0]["params"] = [(n, named[n]) for n, _ in params[0]["params"]]
        optimizer = ShardedAdaBelief(params, amsgrad=change == "amsgrad")
        before = [p.detach().clone() for p in model.parameters()]
        scaler = torch.amp.GradScaler("cpu") if change == "scaler" else None
        shown = {"nameless": None, "stranger": Odd(torch.float32, 0)}.get(change, model)
        with pytest.raises(CheckpointError, match=sentence):
            checkpoint.load(tmp_path, model=shown, optimizer=optimizer, scaler=scaler)
        for param, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(param, old)

    run_threads(3, partial(save, tmp_path))
    run_threads(2, load)


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond `nbytes`, as if the disk were full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [0, 100, 4000])
def test_a_full_disk(tmp_path: Path, nbytes: int) -> None:
    def fails() -> None:
        with pytest.raises(CheckpointError, match=r"cannot save step 5 to .* File too large"):
            save(tmp_path, 5)

    run_threads(3, partial(save, tmp_path))
    with full_disk(nbytes):
        run_threads(3, fails)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]
    run_threads(2, lambda: loads_newest(tmp_path, 3))


def loads_newest(run: Path, step: int) -> None:
    model, optimizer = build()
    assert checkpoint.load(run, model=model, optimizer=optimizer).step == step


def test_no_folder_can_be_made(tmp_path: Path) -> None:
    def fails() -> None:
        with pytest.raises(CheckpointError, match=r"cannot save step 3 to .* Not a directory"):
            save(tmp_path / "file" / "run")

    (tmp_path / "file").write_text("")
    run_threads(2, fails)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    def fails() -> None:
        with pytest.raises(CheckpointError, match=r"cannot save step 3 to .* Permission denied"):
            save(tmp_path / "run")

    tmp_path.chmod(0o500)
    run_threads(2, fails)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"extra": {"rng": object()}}, r"extra\['rng'\] holds a object; a checkpoint takes None"),
        ({"extra": {1: 2}}, "keys of extra must be strings, got 1"),
        ({"keep": 0}, "keep must be an integer >= 1 or None, got 0"),
        ({"step": -1}, "step must be an integer >= 0, got -1"),
    ],
)
def test_arguments(tmp_path: Path, options: Any, sentence: str) -> None:
    def fails() -> None:
        model, optimizer = build()
        arguments = {"step": 3, "model": model, "optimizer": optimizer, **options}
        with pytest.raises(CheckpointError, match=sentence):
            checkpoint.save(tmp_path / "run", **arguments)

    run_threads(2, fails)
    assert not (tmp_path / "run").exists()


def test_one_rank_has_a_problem(tmp_path: Path) -> None:
    def fails() -> None:
        model, optimizer = build()
        extra = {"x": object() if dist.get_rank() == 1 else 1}
        with pytest.raises(
            CheckpointError, match=r"step 3 .*: rank 1: extra\['x'\] holds a object"
        ):
            checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer, extra=extra)

    run_threads(3, fails)


def test_retention_and_replacement(tmp_path: Path) -> None:
    def saves() -> None:
        model, optimizer = build()
        for step in (1, 2, 3, 2):  # the last one goes back
            checkpoint.save(tmp_path, step, model=model, optimizer=optimizer, keep=2)

    run_threads(2, saves)
    left = ["latest", "step-00000002", "step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    loads_newest(tmp_path, 2)
    shutil.rmtree(tmp_path / "step-00000002")  # as if killed before the pointer was moved
    loads_newest(tmp_path, 3)


KILLING = """
import os, random, signal, sys, time, torch
from belief_dist import AdaBelief, checkpoint

run, kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)

def new(value):
    model = torch.nn.Linear(700, 700)
    optimizer = AdaBelief(model.parameters())
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
            state = optimizer.state[param] = AdaBelief._new_state(param, False, "cpu")
            state["exp_avg"].fill_(value)
            state["step"] = value
    return model, optimizer

def write_for_ever(step):
    while True:
        step += 1
        model, optimizer = new(step)
        checkpoint.save(run, step, model=model, optimizer=optimizer, keep=2)

generator = random.Random(os.environ.get("SEED", "0"))
newest = 0
model, optimizer = new(0)
checkpoint.save(run, 0, model=model, optimizer=optimizer)
for _ in range(kills):
    writer = os.fork()
    if writer == 0:
        write_for_ever(newest)
    time.sleep(0.3 * generator.random())
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    model, optimizer = new(-1)
    step = checkpoint.load(run, model=model, optimizer=optimizer).step
    assert step >= newest, (step, newest)
    newest = step
    for param in model.parameters():
        state = optimizer.state[param]
        assert (param == step).all() and (state["exp_avg"] == step).all()
        assert state["step"] == step
print(newest)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """After every kill the newest complete checkpoint is found, whole and never an older one."""
    kills = os.environ.get("BELIEF_DIST_KILLS", "10")
    command = [sys.executable, "-c", KILLING, str(tmp_path), kills]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
