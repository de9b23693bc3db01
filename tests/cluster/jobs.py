"""The main job at a small size: its commands for each launcher, and what it has computed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from belief_dist.checkpoint.formats.convert import differences
from belief_dist.checkpoint.formats.full_state import read_full_state
from lab import Node
from tests.harness.forked import Job, run_all_forked

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPT = ROOT / "examples" / "train_gpt.py"
# A batch that 1, 2, 3 and 4 ranks can share.
SETTINGS = (
    "--layers 1 --width 32 --heads 2 --context 32 --batch 12 --warmup 2 --steps 6 --eval_every 100 "
    "--save_every 3 --sample_bytes 5 --timeout 60"
).split()


# For jobs that something else ends.
ENDLESS = ["--steps", "100000", "--save_every", "100000"]
LAUNCH = ROOT / "launch"
# mpi4py would load the MPI of the environment it is installed in.
OPEN_MPI = {
    "PATH": f"/usr/bin:/bin:/usr/sbin:/sbin:{BIN}",
    "MPI4PY_LIBMPI": "libmpi.so.40",
}


def hostfile(folder: Path, **slots: int) -> Path:
    """Write the hosts' names and numbers of ranks."""
    path = folder / "hostfile"
    path.write_text("".join(f"{host} slots={count}\n" for host, count in slots.items()))
    return path


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a shell that starts a job."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    return kept | {
        "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def local(ranks: int, folder: Path, *settings: object) -> Path:
    """Train on this machine, without a lab or a launcher; return the folder of the run."""
    run_all_forked(SCRIPT, folder.parent, [local_job(ranks, folder, *settings)])
    return folder


def local_job(ranks: int, folder: Path, *settings: object) -> Job:
    """Return one of several jobs of `SCRIPT` that this machine is to train."""
    config = ["--config", ROOT / "configs" / "gpt.yaml"]
    return Job(ranks, [*config, *SETTINGS, "--folder", folder, *settings])


def wait_for_step(run: Path, step: int, seconds: float) -> None:
    """Wait until the log of a run has a step.

    Raises:
        TimeoutError: It has not got so far in time.
    """
    deadline = time.monotonic() + seconds
    log = run / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= step):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{log} has not got to step {step} in {seconds} s")
        time.sleep(0.02)


def rank_on(node: Node) -> int:
    """Return the process of a rank on a node."""
    return next(
        pid
        for pid, command in node.pids().items()
        if any(word.endswith("train_gpt.py") for word in command.split()[1:3])
    )


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the log of a run: step, loss, norm of the gradient, learning rate."""
    read = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: row[k] for k in ("step", "loss", "grad_norm", "lr")} for row in read]


def unlike(one: Path, other: Path) -> list[str]:
    """Return where the logs and the final p, m, s and steps of two runs differ in any bit."""
    found = differences(*(read_full_state(final(run)) for run in (one, other)))
    pairs = zip(rows(one), rows(other), strict=True)
    return found + [f"{ours} {theirs}" for ours, theirs in pairs if ours != theirs]


def final(run: Path) -> Path:
    """Return the last checkpoint of a run."""
    return max(run.glob("step-????????"))
