"""A job that loses a node goes on with the others, from the last checkpoint, resharded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs import LAUNCH, SCRIPT, SETTINGS, environment, local_job, rows, unlike, wait_for_step
from lab import Lab
from tests.harness.forked import run_all_forked

STEPS = 80
MORE = ["--steps", str(STEPS), "--save_every", "5"]


@pytest.mark.timeout(600)  # five launches, one of which waits for a dead node
def test_a_lost_node_costs_the_steps_since_the_checkpoint(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [LAUNCH / "torchrun.sh", *SETTINGS, *MORE, "--folder", run]
    variables = environment(HEAD="node0", NNODES="1:3", NPROC="1")
    job = lab.job({node: command for node in range(3)}, variables, tmp_path, 300)
    wait_for_step(run, 8, 120)
    lab.nodes[2].crash()
    statuses = job.wait()
    lab.nodes[2].boot()
    lab.nodes[2].wait_until_up()
    assert statuses[:2] == [0, 0], job.output

    # Where each generation began, and with how many ranks. Nodes that come late make one more.
    generations = re.findall(r"parameters, (\d) ranks? .* from step (\d+),", job.output)
    began = [(int(step), int(ranks)) for ranks, step in generations]
    assert [ranks for _, ranks in began[-2:]] == [3, 2], job.output
    assert began[-1][0] >= 5 and began[-1][0] % 5 == 0
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))

    # Exact: each generation has the bits of as many local ranks that continue from its checkpoint.
    by_hand, whole = tmp_path / "by_hand", tmp_path / "whole"
    jobs = [local_job(3, whole, *MORE)]
    for number, (_, ranks) in enumerate(began):
        last = began[number + 1][0] if number + 1 < len(began) else STEPS
        if last > began[number][0]:
            stop = ["--stop_at", last, "--eval_every", STEPS]
            jobs.append(local_job(ranks, by_hand, *MORE, *stop))
    run_all_forked(SCRIPT, tmp_path, jobs)
    assert unlike(run, by_hand) == []

    # And rounding alone tells it from a run that has lost nothing.
    assert unlike(run, whole) != []
    for ours, theirs in zip(rows(run), rows(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
