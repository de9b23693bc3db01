"""Starts a job's ranks by one of the launchers that DeepSpeed's users have."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.jobs import free_port, run_job
from tests.harness.paths import BIN, ROOT


def launch(
    folder: Path,
    *arguments: str,
    job: Sequence[str | Path],
    world_size: int = 2,
    starter: str = "deepspeed",
    **more: str,
) -> None:
    """Run a job by a launcher; fail with its output if it fails.

    Args:
        folder: The job's first argument, and where it runs.
        arguments: Its further ones.
        job: What the launcher runs on every rank.
        world_size: How many ranks.
        starter: "deepspeed", "torchrun", or "spawn" for a job that starts its ranks itself.
        more: Environment variables.
    """
    port = free_port()
    started_by = {
        "deepspeed": [
            BIN / "deepspeed",
            *("--num_accelerators", world_size, "--master_addr", "127.0.0.1"),
            *("--master_port", port),
        ],
        "torchrun": [BIN / "torchrun", "--nproc-per-node", world_size, "--master-port", port],
        "spawn": [sys.executable],
    }
    command = [*started_by[starter], *job, folder, *arguments]
    if starter == "spawn":
        command += ["--spawn", port]
    environment = (
        os.environ
        | {
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        | more
    )
    done = run_job(command, folder, environment, seconds=900)
    assert done.returncode == 0, done.stdout[-8000:]


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)
