"""A long run whose ranks die every few hundred steps and which goes on with another number of them.

Each generation of ranks is ended by one of them, which is killed, stopped, raises or leaves; the
next one, of another size, goes on from the newest step in memory (`checkpoint.Standby`). With
numbered micro-batches the last weights must be those of one process that nothing has disturbed.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from belief_dist import ShardedAdaBelief
from belief_dist.checkpoint import Standby
from belief_dist.data import seeded

WAYS = ("killed", "stopped", "raises", "leaves")
_MICRO_BATCHES = 4
_TIMEOUT = timedelta(seconds=6)  # of the process group; the optimizer's own is half
_OVER = 20.0  # seconds after which a rank that has not ended hangs


def run_through_failures(steps: int, between: int, every: int, seed: int) -> dict[str, Any]:
    """Train for `steps` steps, and compare with a run in this process.

    Args:
        steps: In all.
        between: Mean number of steps between two failures.
        every: Keep one of so many steps in memory.
        seed: Of when and how ranks fail, and of how many there are.

    Returns:
        What happened.
    """
    draw = random.Random(seed)
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "belief_dist.checkpoint"])
    reached, ranks, lost, hangs = 0, 4, [], 0
    seconds: list[float] = []
    ways: dict[str, int] = dict.fromkeys(WAYS, 0)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch, tqdm(total=steps) as bar:
        for generation in itertools.count():
            way = draw.choice(WAYS)
            plan = {
                "dies at": reached + 1 + int(draw.expovariate(1 / between)),
                "victim": draw.randrange(ranks),
                "way": way,
                "steps": steps,
                "every": every,
            }
            folder = Path(scratch, f"generation{generation}")
            folder.mkdir()
            begin = time.monotonic()
            hangs += _run_generation(ranks, folder, Path(scratch, "memory"), plan)
            told = [json.loads(path.read_text()) for path in folder.glob("told*")]
            began = max(each["began"] for each in told)
            if generation:
                lost.append(reached - began)
                assert 0 <= lost[-1], (reached, began)
            bar.update(max(each["reached"] for each in told) - bar.n)
            reached = max(each["reached"] for each in told)
            if (found := folder / "weights.pt").exists():
                weights = torch.load(found)
                break
            ways[way] += 1
            seconds.append(time.monotonic() - begin)
            ranks = draw.choice([n for n in (2, 3, 4) if n != ranks])
    return {
        "steps": steps,
        "kept every": every,
        "failures": sum(ways.values()),
        **ways,
        "hangs": hangs,
        "steps lost, median": median(lost) if lost else 0,
        "most": max(lost, default=0),
        "same bits": _equal(weights, _undisturbed(steps)),
    }


def _run_generation(ranks: int, folder: Path, memory: Path, plan: dict[str, Any]) -> int:
    """Run ranks until all have ended; return how many had to be ended long after the failure."""
    context = multiprocessing.get_context("forkserver")
    running = [
        context.Process(target=_main, args=(rank, ranks, folder, memory, plan), daemon=True)
        for rank in range(ranks)
    ]
    for process in running:
        process.start()
    while any(process.is_alive() for process in running) and not (folder / "failed").exists():
        time.sleep(0.02)
    for rank, process in enumerate(running):
        if rank != plan["victim"]:
            process.join(_OVER)
    hanging = [p for r, p in enumerate(running) if p.is_alive() and r != plan["victim"]]
    for process in running:
        process.kill()
        process.join()
    return len(hanging)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.1), nn.Tanh(), nn.Linear(32, 8))


def _backward(model: nn.Module, step: int, k: int) -> None:
    with seeded(7, step, k):
        model(torch.randn(8, 16)).square().mean().backward()


def _main(rank: int, ranks: int, folder: Path, memory: Path, plan: dict[str, Any]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # tracebacks that are wanted
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/s", rank=rank, world_size=ranks, timeout=_TIMEOUT
    )
    model = _model()
    optimizer = ShardedAdaBelief(
        model.named_parameters(),
        lr=1e-3,
        max_grad_norm=1.0,
        micro_batches=_MICRO_BATCHES,
        check_states=True,
    )
    began = reached = 0

    def tell() -> None:
        found = json.dumps({"began": began, "reached": reached})
        Path(folder, f"told{rank}").write_text(found)

    try:
        # No `with`: a generation that ends by itself leaves the block like one that fails.
        standby = Standby(memory, model=model, optimizer=optimizer, timeout=_TIMEOUT)
        loaded = standby.resume()
        began = reached = loaded.step if loaded else 0
        while reached < plan["steps"]:
            for k in range(rank, _MICRO_BATCHES, ranks):
                _backward(model, reached, k)
            if rank == plan["victim"] and reached + 1 == plan["dies at"]:
                tell()
                _end(folder, plan["way"])
            optimizer.step()
            optimizer.zero_grad()
            reached += 1
            if reached % plan["every"] == 0:
                standby.save(reached)
        standby.close()
        optimizer.wait_pending()
        if rank == 0:
            torch.save(model.state_dict(), folder / "part.pt")
            (folder / "part.pt").rename(folder / "weights.pt")
    except Exception as error:
        Path(folder, f"error{rank}").write_text(repr(error))
    tell()
    os._exit(0)


def _end(folder: Path, way: str) -> None:
    Path(folder, "failed").touch()
    if way == "raises":
        raise RuntimeError("out of memory, say")
    if way == "leaves":
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL if way == "killed" else signal.SIGSTOP)


def _undisturbed(steps: int) -> dict[str, torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = _model()
    optimizer = ShardedAdaBelief(
        model.named_parameters(), lr=1e-3, max_grad_norm=1.0, micro_batches=_MICRO_BATCHES
    )
    for step in range(steps):
        for k in range(_MICRO_BATCHES):
            _backward(model, step, k)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.wait_pending()
    torch.set_num_threads(before)
    return model.state_dict()


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
