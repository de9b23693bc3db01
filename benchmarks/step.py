"""A whole training step on several ranks: forward, backward, communication and update.

Every engine has processes of its own, and engines take turns, round by round: none works in memory
that another has left behind, and whatever else the machine does slows all of them down. Ranks share
the cores, so this shows the work that an engine causes, and little of what overlap gains on a real
network.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict

import torch

from benchmarks.engines import BASELINE, COMPUTE, ENGINES, missing_package
from benchmarks.report import Result, Row
from benchmarks.team import Team, Workload


def chosen_engines(only: Sequence[str]) -> list[str]:
    """Return the engines whose name contains one of the words `only`; all if there are no words."""
    return [n for n in ENGINES if not only or any(w.lower() in n.lower() for w in only)]


def run_step(work: Workload, rounds: int, only: Sequence[str]) -> Result:
    """Time training steps.

    Args:
        work: What every engine trains.
        rounds: How often the engines take turns.
        only: As for `chosen_engines`.
    """
    chosen = chosen_engines(only)
    names = [name for name in chosen if missing_package(name) is None]
    notes = ["AdamW is torch's, fused; peak memory is that of rank 0, beyond an idle process."]
    notes += [f"No {n}: {missing_package(n)} is not installed." for n in chosen if n not in names]
    threads = max(1, len(os.sched_getaffinity(0)) // work.ranks)
    rows = {name: Row(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        teams = {name: Team(name, work, threads, folder) for name in names}
        for _ in range(rounds):
            for name, team in teams.items():
                seconds, rows[name].peak_mib = team.take_turn()
                rows[name].seconds.extend(seconds)
        for team in teams.values():
            team.dismiss()
    with torch.device("meta"):
        parameters = sum(param.numel() for param in work.model().parameters())
    return Result(
        title="One training step of a GPT",
        settings={
            "float32 parameters": f"{parameters / 1e6:.1f} M",
            **asdict(work),
            "threads per rank": threads,
        },
        rows=list(rows.values()),
        baselines={BASELINE: "DDP", COMPUTE: "compute"},
        notes=notes,
    )
