"""Each recipe of launch/ on several hosts: the same bits as as many ranks on one host."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import LAUNCH, OPEN_MPI, SETTINGS, environment, hostfile, unlike
from lab import Lab

RECIPES = {
    # Its variables, its command, and on how many nodes the command is given.
    "deepspeed-pdsh": ({}, ["deepspeed.sh", "HOSTFILE"], 1),
    "deepspeed-openmpi": (OPEN_MPI | {"LAUNCHER": "openmpi"}, ["deepspeed.sh", "HOSTFILE"], 1),
    "mpirun-openmpi": (OPEN_MPI, ["mpirun.sh", "HOSTFILE"], 1),
    "mpirun-mpich": ({}, ["mpirun.sh", "HOSTFILE"], 1),
    "torchrun-2x2": ({"HEAD": "node0", "NNODES": "2", "NPROC": "2"}, ["torchrun.sh"], 2),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bits_are_those_of_one_host(
    recipe: str, lab: Lab, four_ranks: Path, tmp_path: Path
) -> None:
    variables, (script, *arguments), num_nodes = RECIPES[recipe]
    hosts = hostfile(tmp_path, node0=2, node1=2)
    arguments = [str(hosts) if word == "HOSTFILE" else word for word in arguments]
    command = [LAUNCH / script, *arguments, *SETTINGS, "--folder", tmp_path / "run"]
    job = lab.job(
        {node: command for node in range(num_nodes)}, environment(**variables), tmp_path, 240
    )
    assert not any(job.wait()), job.output
    assert unlike(tmp_path / "run", four_ranks) == []
