"""Steps that are kept in the hosts' memory: a lost host costs none, and no bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from belief_dist import checkpoint
from belief_dist.checkpoint import CheckpointError, Standby, file_transfer
from tests.harness import paths
from tests.harness.checkpoints import build, compare, everything, train
from tests.harness.forked import PRELOADED, Job, run_all_forked
from tests.harness.ranks import run_ranks

Hosts = tuple[int, ...]  # of each rank its host


def folder_of(tmp: Path, hosts: Hosts) -> Path:
    return tmp / f"host{hosts[dist.get_rank()]}" / "run"


def until_lost(tmp: Path, hosts: Hosts, options: dict[str, Any]) -> None:
    """Train for some steps, keeping each, and write down what the next ones would give."""
    model, optimizer = build(**options)
    standby = Standby(folder_of(tmp, hosts), model=model, optimizer=optimizer)
    assert standby.resume() is None
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        standby.save(step + 1, extra={"seen": step + 1})
    assert standby.wait() is not None
    own, other = hosts[dist.get_rank()], {*hosts} - {hosts[dist.get_rank()]}
    kept = sorted(folder_of(tmp, hosts).glob("*/*.distcp"))
    assert {path.parent.name for path in kept} == {"step-00000005"}  # and no older one
    if len(other) == 1:  # its own ranks' and all of the other host's
        assert len(kept) == len(hosts), (own, kept)
    train(model, optimizer, range(5, 7))
    whole = everything(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(whole, tmp / "expected.pt")


def go_on(tmp: Path, hosts: Hosts, options: dict[str, Any]) -> None:
    model, optimizer = build(seed=5, **options)
    with Standby(folder_of(tmp, hosts), model=model, optimizer=optimizer) as standby:
        loaded = standby.resume()
        assert loaded is not None and (loaded.step, loaded.extra) == (5, {"seen": 5})
        for step in range(5, 7):
            train(model, optimizer, range(step, step + 1))
            standby.save(step + 1)
        expected = torch.load(tmp / "expected.pt", weights_only=False)
        compare(everything(model, optimizer), expected, f"{hosts}")
    assert not folder_of(tmp, hosts).exists()


SMALL = {"dtype": torch.bfloat16, "stage": 2, "master": "remainder", "state_dtype": torch.uint8}
# Which of two hosts of two ranks is lost, and on which hosts ranks go on: the other one alone, or
# with an empty one in its place.
LOST: list[tuple[dict[str, Any], list[tuple[int, Hosts]]]] = [
    ({}, [(1, (0, 0)), (0, (1, 0)), (0, (0, 0, 1, 1))]),
    (SMALL, [(0, (1, 1)), (1, (0, 0, 1, 1))]),
]


@pytest.mark.parametrize(("options", "lost_and_hosts"), LOST, ids=["float32", "8 bits"])
def test_a_lost_host_costs_no_step(
    tmp_path: Path, options: dict[str, Any], lost_and_hosts: list[tuple[int, Hosts]]
) -> None:
    before = tmp_path / "before"
    run_ranks(4, tmp_path, partial(until_lost, before, (0, 0, 1, 1), options))
    for lost, hosts in lost_and_hosts:
        now = tmp_path / f"{lost}{hosts}"
        shutil.copytree(before, now)
        shutil.rmtree(now / f"host{lost}")
        run_ranks(len(hosts), tmp_path, partial(go_on, now, hosts, options))


def test_three_hosts_of_which_any_is_lost(tmp_path: Path) -> None:
    before = tmp_path / "before"
    run_ranks(4, tmp_path, partial(until_lost, before, (0, 1, 1, 2), {}))
    for lost in range(3):
        now = tmp_path / f"{lost}"
        shutil.copytree(before, now)
        shutil.rmtree(now / f"host{lost}")
        hosts = tuple(host for host in range(3) if host != lost)
        run_ranks(2, tmp_path, partial(go_on, now, hosts, {}))


def fails_and_keeps_the_last(tmp: Path, hosts: Hosts) -> None:
    """No room on one host: all ranks are told by the next call, and the step before is there."""
    model, optimizer = build()
    standby = Standby(folder_of(tmp, hosts), model=model, optimizer=optimizer)
    train(model, optimizer, range(1))
    standby.save(1)
    standby.wait()
    write = file_transfer._OwnPart._write

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        file_transfer._OwnPart._write = full  # type: ignore[method-assign]
    standby.save(2)
    with pytest.raises(CheckpointError, match=r"cannot keep step 2 .* rank 1: .*No space left"):
        standby.wait()
    file_transfer._OwnPart._write = write  # type: ignore[method-assign]
    loaded = standby.resume()
    assert loaded is not None and loaded.step == 1
    train(model, optimizer, range(1, 2))
    standby.save(2)
    standby.wait()
    standby.close()


def damaged_and_foreign(tmp: Path, hosts: Hosts) -> None:
    model, optimizer = build()
    train(model, optimizer, range(1))
    standby = Standby(folder_of(tmp, hosts), model=model, optimizer=optimizer)
    standby.save(1)
    standby.wait()
    dist.barrier()
    mine = folder_of(tmp, hosts) / "step-00000001"
    if dist.get_rank() == 1:
        victim = next(iter(mine.glob("__1_*")))
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"__1_0.distcp has changed since it was written"):
        standby.resume()
    open_to_all = tmp / "open"
    if dist.get_rank() == 0:
        open_to_all.mkdir()
        open_to_all.chmod(0o777)
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"others may write to .*chmod 700"):
        Standby(open_to_all, model=model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="is no folder of this user"):
        (tmp / f"file{dist.get_rank()}").touch()
        Standby(tmp / f"file{dist.get_rank()}", model=model, optimizer=optimizer)


def test_what_goes_wrong(tmp_path: Path) -> None:
    cases: list[Callable[..., None]] = [fails_and_keeps_the_last, damaged_and_foreign]
    run_ranks(2, tmp_path, *(partial(case, tmp_path / case.__name__, (0, 1)) for case in cases))


def test_processes_that_stay(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, partial(those_that_are_left_go_on, tmp_path))


JOB = """
import os, signal, sys
from datetime import timedelta
import torch, torch.distributed as dist
from belief_dist import ShardedAdaBelief, distributed
from belief_dist.checkpoint import Standby

folder, out, dies_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
distributed.init(backend="gloo", timeout=timedelta(seconds=20))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5))
optimizer = ShardedAdaBelief(model.named_parameters(), lr=1e-2)
first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
with Standby(folder, model=model, optimizer=optimizer) as standby:
    loaded = standby.resume()
    begin = loaded.step if loaded else 0
    if not first and dist.get_rank() == 0:
        print("went on from", begin, flush=True)
    for step in range(begin, 12):
        torch.manual_seed(step * 10 + dist.get_rank())
        model(torch.randn(4, 20)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        standby.save(step + 1)
        if first and step + 1 == dies_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    optimizer.wait_pending()
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), out)
dist.destroy_process_group()
"""


def those_that_are_left_go_on(tmp: Path) -> None:
    """In the same processes: a group of two of the three, a new optimizer, and the same step."""
    model, optimizer = build()
    standby = Standby(tmp / "run", model=model, optimizer=optimizer)
    train(model, optimizer, range(3))
    standby.save(3)
    standby.wait()
    expected = everything(model, optimizer)
    if dist.get_rank() < 2:
        left = dist.new_group([0, 1], use_local_synchronization=True)
        model, optimizer = build(seed=5, process_group=left)
        with Standby(tmp / "run", model=model, optimizer=optimizer) as standby:
            loaded = standby.resume()
            assert loaded is not None and loaded.step == 3
            compare(everything(model, optimizer), expected, "two of three")
            train(model, optimizer, range(3, 5))
            standby.save(5)


def test_a_killed_rank_under_torchrun(tmp_path: Path) -> None:
    """The launcher starts all ranks again, which go on from the last step that was written."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    run_all_forked(
        script,
        tmp_path,
        [Job(3, [tmp_path / "undisturbed", tmp_path / "expected.pt", 0])],
        preloaded=PRELOADED[:4],
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=3", "--max-restarts=1", script),
            *(tmp_path / "memory", tmp_path / "found.pt", "7"),
        ],
        env={**os.environ, "PYTHONPATH": str(paths.ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "went on from 6" in done.stdout or "went on from 7" in done.stdout
    assert not (tmp_path / "memory").exists()
    found, expected = (torch.load(tmp_path / f"{name}.pt") for name in ("found", "expected"))
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_one_rank_alone(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, range(2))
    standby = checkpoint.Standby(tmp_path / "run", model=model, optimizer=optimizer)
    standby.save(2)
    standby.wait()
    other, its = build(seed=5)
    with checkpoint.Standby(tmp_path / "run", model=other, optimizer=its) as after:
        loaded = after.resume()
        assert loaded is not None and loaded.step == 2
        compare(everything(other, its), everything(model, optimizer), "alone")
    assert not (tmp_path / "run").exists()
