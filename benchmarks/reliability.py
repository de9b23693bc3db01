"""Commands that break things: ranks that end, and bits that flip."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any

from benchmarks.console import console, table_of
from benchmarks.faults import run_faults
from benchmarks.flips import RANKS, run_clean, run_cost, run_flips
from benchmarks.network_faults import run_network_faults
from benchmarks.report import machine
from benchmarks.soak import run_through_failures
from benchmarks.standby import run_standby


def _keep(json: Path | None, found: dict[str, Any]) -> None:
    if json is not None:
        json.write_text(json_module.dumps({"machine": machine(), **found}, indent=1) + "\n")


def faults(seeds: int = 2, only: list[str] | None = None, json: Path | None = None) -> None:
    """End one rank of three at every phase of a step, in every way, under us and under peers.

    Args:
        seeds: Moments of each phase and way; two take half an hour.
        only: Words of which one is in the name of each engine that is chosen.
        json: Write the table here.
    """
    rows, single = run_faults(seeds, only or (), lambda cases: _keep(json, {"cases": cases}))
    console().print(table_of("One rank of three ends", rows, left=("engine", "rank 1")))
    _keep(json, {"rows": rows, "cases": single})


def network_faults(only: list[str] | None = None, json: Path | None = None) -> None:
    """Pull a host's cable for a while or for ever, lose packets, or let a rank be slow (root only).

    Args:
        only: Words of which one is in the name of each engine that is chosen.
        json: Write the table here.
    """
    rows, single = run_network_faults(only or ())
    console().print(table_of("The network fails", rows, left=("engine", "fault")))
    _keep(json, {"rows": rows, "cases": single})


def flips(
    flips: int = 1000, clean: int = 0, rounds: int = 0, seed: int = 0, json: Path | None = None
) -> None:
    """Flip bits of parameters, masters, states and gradients, one at a time, under training.

    Args:
        flips: How many; a thousand take two minutes.
        clean: Also train so many steps without any, and count false alarms.
        rounds: Also take so many steps of a GPT on two ranks with and without the checks.
        seed: Of what is flipped.
        json: Write the tables here.
    """
    out = console()
    found: dict[str, Any] = {"rows": run_flips(flips, seed) if flips else []}
    if flips:
        title = f"{flips:,} flipped bits on {RANKS} ranks"
        out.print(table_of(title, found["rows"], left=("flipped",)))
    if clean:
        found |= {"clean steps": clean, "false alarms": run_clean(clean)}
        out.print(f"{found['false alarms']} false alarms in {clean:,} steps without a flip")
    if rounds:
        found["cost"] = run_cost(2, rounds)
        out.print(table_of("Cost of check_states", [found["cost"]], left=()))
    _keep(json, found)


def standby(rounds: int = 10, every: int = 1, json: Path | None = None) -> None:
    """Time steps of a GPT on two ranks whose states are kept in memory, beside steps without.

    Args:
        rounds: How often both take turns.
        every: Keep one of so many steps.
        json: Write the table here.
    """
    rows = run_standby(rounds, every)
    console().print(table_of(f"One of {every} steps kept in memory", rows, left=()))
    _keep(json, {"every": every, "rows": rows})


def soak(
    steps: int = 20_000,
    between: int = 400,
    every: int = 10,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Train through failures with another number of ranks after each, and compare the last bits.

    Args:
        steps: In all; 20,000 take a quarter of an hour.
        between: Mean number of steps between two failures.
        every: Keep one of so many steps in memory.
        seed: Of when and how ranks fail, and of how many there are.
        json: Write the table here.
    """
    found = run_through_failures(steps, between, every, seed)
    console().print(table_of("Steps through failures, on 2 to 4 ranks", [found], left=()))
    _keep(json, found)
