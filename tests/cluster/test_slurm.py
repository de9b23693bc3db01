"""The batch scripts of launch/slurm on a real Slurm of four nodes, and what ends a step."""

from __future__ import annotations

import os
import re
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
    local,
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
    folder = [] if "sbatch" in recipe else ["--folder", tmp_path / "run"]
    job = lab.job(
        {0: ["env", f"--chdir={ROOT}", *command, *SETTINGS, *folder]},
        environment(RUN=str(tmp_path / "run"), **slurm_variables),
        tmp_path,
        240,
    )
    assert not any(job.wait()), job.output + (output.read_text() if output.exists() else "")
    assert unlike(tmp_path / "run", four_ranks) == []


LONG = ["--steps", "300", "--save_every", "20"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local(2, tmp_path_factory.mktemp("two") / "run", *LONG)


@pytest.mark.parametrize(
    ("script", "interruption"),
    [
        # Slurm sends USR1 first, and the job saves.
        (
            "srun.sbatch",
            "sbatch --partition=urgent --exclusive --nodes=4 --output=/dev/null --wrap=:",
        ),
        # Its ranks get SIGTERM, and save.
        ("torchrun.sbatch", "scontrol requeue JOB"),
    ],
    ids=["preempted", "requeued"],
)
def test_a_batch_job_that_is_interrupted_ends_as_one_that_is_not(
    script: str,
    interruption: str,
    slurm_variables: dict[str, str],
    lab: Lab,
    two_ranks: Path,
    tmp_path: Path,
) -> None:
    run, output = tmp_path / "run", tmp_path / "slurm.out"
    command = slurm.batch("--nodes=2", f"--output={output}", f"launch/slurm/{script}")
    job = lab.job(
        {0: ["env", f"--chdir={ROOT}", *command, *SETTINGS, *LONG]},
        environment(RUN=str(run), **slurm_variables),
        tmp_path,
        300,
    )
    wait_for_step(run, 30, 120)
    on_slurm = ["env", *(f"{name}={value}" for name, value in slurm_variables.items())]
    number = lab.nodes[0].run(*on_slurm, "squeue", "--noheader", "--format=%i").strip()
    lab.nodes[0].run(*on_slurm, *interruption.replace("JOB", number).split())
    assert not any(job.wait()), job.output + output.read_text()

    said = output.read_text()
    first, began = map(int, re.findall(r" from step (\d+),", said))
    assert first == 0 and 20 <= began < 300, said
    asked = script == "srun.sbatch"
    assert (f"Slurm will end this job: saving in {run}" in said) == asked
    # All that it had done. After SIGTERM Slurm waits 5 s, for which a machine may be too busy.
    assert began >= 30 or (began == 20 and not asked)
    assert unlike(run, two_ranks) == []


@pytest.mark.parametrize(
    ("number", "at_least", "at_most"),
    # At once; and at the timeout, after which Slurm waits KillWait. Both on a loaded machine.
    [(signal.SIGKILL, 0, 20), (signal.SIGSTOP, 4, 5 + 5 + 15)],
    ids=["killed", "stopped"],
)
def test_a_rank_that_is_lost_ends_the_step(
    number: signal.Signals,
    at_least: float,
    at_most: float,
    slurm_variables: dict[str, str],
    lab: Lab,
    tmp_path: Path,
) -> None:
    timeout = ["--timeout", "5"] if number == signal.SIGSTOP else []  # else 60, of SETTINGS
    command = [*SLURM["srun"], *SETTINGS, *ENDLESS, *timeout, "--folder", tmp_path / "run"]
    job = lab.job(
        {0: ["env", f"--chdir={ROOT}", *command]}, environment(**slurm_variables), tmp_path, 200
    )
    wait_for_step(tmp_path / "run", 3, 120)
    lost = job.elapsed
    os.kill(rank_on(lab.nodes[3]), number)
    assert all(job.wait()), job.output
    assert at_least < job.seconds - lost < at_most, job.output
