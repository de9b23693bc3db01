"""Saving and loading take the memory of a few pieces, and never that of the whole."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from belief_dist import ShardedAdaBelief, checkpoint
from tests.harness.ranks import run_ranks

SIDE = 4096
LAYERS = 2  # of 64 MiB each: with states 384 MiB, half of which is a shard
ROOM = 40  # MiB: two pieces of 16 MiB at once, and what torch.save adds
JOINED = 64  # MiB of masters, which are split into their halves when all are there
M_MMAP_THRESHOLD = -3  # of mallopt(3)


def peak_beyond(action: Any) -> float:
    """Return by how many MiB the process has grown meanwhile."""

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def takes_little(run: Path, options: dict[str, Any]) -> None:
    # glibc keeps freed pieces on its heap once a first one was freed. Those count as memory of the
    # process, and how many there are is chance: give each back as it is freed.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS))
    ).to(torch.bfloat16 if options else torch.float32)
    # What this process writes into its peers' memory would count here as well.
    options = {**options, "shared_memory": False}
    optimizer = ShardedAdaBelief(model.named_parameters(), stage=2, **options)
    parts: Any = {"model": model, "optimizer": optimizer}
    for state in optimizer.state.values():  # memory counts from its first use on
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.fill_(1)
    # As does that of code: of what saves and loads, too.
    small = torch.nn.Linear(4, 4)
    warm: Any = {"model": small, "optimizer": ShardedAdaBelief(small.named_parameters(), stage=2)}
    checkpoint.save(run.with_name(f"{run.name}.warm"), 1, **warm)
    checkpoint.load(run.with_name(f"{run.name}.warm"), **warm)
    for action in (
        lambda: checkpoint.save(run, 1, **parts),
        lambda: checkpoint.load(run, **parts),
    ):
        beyond = peak_beyond(action)
        allowed = ROOM + (JOINED if "master" in options else 0)
        assert beyond < allowed, (beyond, dist.get_rank(), options)


def test_memory(tmp_path: Path) -> None:
    run_ranks(
        2,
        tmp_path,
        partial(takes_little, tmp_path / "a", {}),
        partial(takes_little, tmp_path / "b", {"master": "remainder", "state_dtype": "bfloat16"}),
    )
