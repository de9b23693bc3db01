"""A whole training step on several ranks: forward, backward, communication and update.

Engines take turns, round by round, so that whatever else the machine does slows all of them down.
Ranks share the cores: on the loopback this shows the work that an engine causes. What overlap gains
shows behind a link that is slower than memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.engines import BASELINE, BY_JSON, COMPUTE, ENGINES, missing_package
from benchmarks.network import Network
from benchmarks.report import Result, Row
from benchmarks.team import Workload, take_turn


def chosen_engines(only: Sequence[str]) -> list[str]:
    """Return the engines whose name contains one of the words `only`; all if there are no words.

    Raises:
        ValueError: There are none.
    """
    chosen = [n for n in ENGINES if not only or any(w.lower() in n.lower() for w in only)]
    if not chosen:
        raise ValueError(f"only={list(only)} is in no engine's name: {'; '.join(ENGINES)}.")
    return chosen


@contextlib.contextmanager
def namespaces(ranks: int, gbit: float | None) -> Iterator[Sequence[str | None]]:
    """Yield a network namespace per rank; without `gbit`, this process's own for all."""
    if gbit is None:
        yield [None] * ranks
        return
    with Network(ranks, gbit or None) as made:
        yield [made.namespace(rank) for rank in range(ranks)]


def run_step(work: Workload, rounds: int, only: Sequence[str], gbit: float | None) -> Result:
    """Time training steps.

    Args:
        work: What every engine trains.
        rounds: How often the engines take turns.
        only: As for `chosen_engines`.
        gbit: Speed of the link between every two ranks in Gbit/s, both ways; 0 for links
            that are not limited, None for the loopback.
    """
    chosen = chosen_engines(only)
    names = [name for name in chosen if missing_package(name) is None]
    notes = [
        "AdamW is torch's, fused. Exposed is the median beyond that of compute only, the update "
        "included. Peak memory is that of rank 0, beyond an idle process."
    ]
    notes += [f"No {n}: {missing_package(n)} is not installed." for n in chosen if n not in names]
    return Result(
        title="One training step of a GPT",
        settings=_settings(work, gbit),
        rows=_take_turns(names, work, rounds, gbit),
        baselines={BASELINE: "DDP"},
        beyond=COMPUTE,
        notes=notes,
    )


def run_by_json(work: Workload, rounds: int, only: Sequence[str]) -> dict[str, Result]:
    """Time training steps of DeepSpeed with its own Adam and with ours, by the same JSON.

    Args:
        work: What all train.
        rounds: How often all take turns.
        only: Words of which one is in the name of each setup that is chosen; all without words.

    Raises:
        ValueError: They choose nothing.
    """
    setups = {s: m for s, m in BY_JSON.items() if not only or any(w in s for w in only)}
    if not setups:
        raise ValueError(f"only={list(only)} is in no setup's name: {'; '.join(BY_JSON)}.")
    rows = _take_turns([name for makers in setups.values() for name in makers], work, rounds, None)
    return {
        setup: Result(
            title=setup,
            settings=_settings(work, None),
            rows=[row for row in rows if row.name in makers],
            baselines={next(iter(makers)): "AdamW"},
        )
        for setup, makers in setups.items()
    }


def _take_turns(names: Sequence[str], work: Workload, rounds: int, gbit: float | None) -> list[Row]:
    rows = [Row(name) for name in names]
    with namespaces(work.ranks, gbit) as places:
        for _ in range(rounds):
            for row in rows:
                turn = take_turn(row.name, work, places)
                row.seconds.extend(turn.seconds)
                for phase, seconds in turn.phases.items():
                    row.phases.setdefault(phase, []).extend(seconds)
                row.sent = turn.sent
                row.peaks_mib.append(turn.peak_mib)
    return rows


def _settings(work: Workload, gbit: float | None) -> dict[str, Any]:
    with torch.device("meta"):
        parameters = sum(param.numel() for param in work.model().parameters())
    return {
        "million parameters": round(parameters / 1e6, 1),
        **asdict(work),
        "threads per rank": work.threads,
        "link": "loopback" if gbit is None else f"{gbit:g} Gbit/s" if gbit else "unlimited",
    }
