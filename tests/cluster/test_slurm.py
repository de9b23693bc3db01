"""The batch scripts of launch/slurm on a real Slurm of four nodes, and what ends a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import slurm
from jobs import (
    BIN,
    ENDLESS,
    ROOT,
    SETTINGS,
    environment,
    rank_on,
    unlike,
    wait_for_step,
)
from lab import Lab


@pytest.fixture(scope="module")
def slurm_variables(shared_lab: Lab) -> Iterator[dict[str, str]]:
    with slurm.cluster(shared_lab) as variables:
        yield variables


SLURM = {
    "srun": [
        *("srun", "--nodes=4", "--ntasks-per-node=1", "--kill-on-bad-exit=1", BIN / "python"),
        *("examples/train_gpt.py", "--config", "configs/gpt.yaml"),
    ],
    "srun.sbatch": slurm.batch(
        *("--nodes=2", "--ntasks-per-node=2", "--output=OUTPUT", "launch/slurm/srun.sbatch")
    ),
    "torchrun.sbatch": slurm.batch("--nodes=4", "--output=OUTPUT", "launch/slurm/torchrun.sbatch"),
}


@pytest.mark.parametrize("recipe", SLURM)
def test_slurm_gives_the_same_bits(
    recipe: str, slurm_variables: dict[str, str], lab: Lab, four_ranks: Path, tmp_path: Path
) -> None:
    output = tmp_path / "slurm.out"
    command = [str(word).replace("OUTPUT", str(output)) for word in SLURM[recipe]]
    job = lab.job(
        {0: ["env", f"--chdir={ROOT}", *command, *SETTINGS, "--folder", tmp_path / "run"]},
        environment(**slurm_variables),
        tmp_path,
        240,
    )
    assert not any(job.wait()), job.output + (output.read_text() if output.exists() else "")
    assert unlike(tmp_path / "run", four_ranks) == []


def test_a_stopped_rank_ends_the_step_at_the_timeout(
    slurm_variables: dict[str, str], lab: Lab, tmp_path: Path
) -> None:
    command = [*SLURM["srun"], *SETTINGS, *ENDLESS, "--timeout", "5", "--folder", tmp_path / "run"]
    job = lab.job(
        {0: ["env", f"--chdir={ROOT}", *command]}, environment(**slurm_variables), tmp_path, 200
    )
    wait_for_step(tmp_path / "run", 3, 120)
    stopped = job.elapsed
    os.kill(rank_on(lab.nodes[3]), signal.SIGSTOP)
    assert all(job.wait()), job.output
    # The timeout, Slurm's KillWait, and time for a loaded machine.
    assert 4 < job.seconds - stopped < 5 + 5 + 45, job.output
