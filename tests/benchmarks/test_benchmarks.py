"""The benchmark commands run, and the controls of the exactness tests are real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import step
from benchmarks.any_world_size import (
    OURS,
    Run,
    any_world_size_table,
    run_any_world_size,
)
from benchmarks.any_world_size_picture import draw_any_world_size
from benchmarks.bits import run_bits
from benchmarks.engines import BY_JSON, ENGINES
from benchmarks.faults import WAYS, Case, cases, run_case
from benchmarks.flips import run_flips
from benchmarks.habits import PEERS, run_habit, table
from benchmarks.host import run_host, run_soak
from benchmarks.resume import compare_runs, draw_resume
from benchmarks.soak import run_through_failures
from benchmarks.step import chosen_engines, run_by_json
from benchmarks.step_trace import record_steps
from benchmarks.step_trace_picture import draw_trace
from benchmarks.team import Turn, Workload, take_turn
from tests.harness.paths import ROOT

CONTROL = "control: bf16 params alone"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_other_ways_to_sum_give_other_bits() -> None:
    # At 2 ranks there is one order only; from 3 on DDP's ring adds in an order of its own.
    found = run_bits([3], 3, ["ShardedAdaBelief ZeRO-1", "DDP + AdaBelief"])
    assert found["ShardedAdaBelief ZeRO-1"][3].elements == 0
    assert found["DDP + AdaBelief"][3].elements > 0.01


def test_an_iteration_is_recorded_and_drawn(tmp_path: Path) -> None:
    found = record_steps(Workload(2, 2, 2, 64, 1, 16, "float32"), 64 << 10)
    assert found.keys() == {"stage 1", "stage 2"}
    for ranges in found.values():
        starts = {name: start for name, start, _ in reversed(ranges)}  # the first of each name
        order = ["forward", "backward", "step", "consensus", "update"]
        assert sorted(order, key=starts.__getitem__) == order
        assert all(0 <= start < stop for _, start, stop in ranges)
        (step,) = (each for each in ranges if each[0] == "step")
        updates = [each for each in ranges if each[0] == "update"]
        assert all(step[1] < start and stop < step[2] for _, start, stop in updates)
    draw_trace(found, tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_runs_at_several_numbers_of_ranks_are_compared_and_drawn(tmp_path: Path) -> None:
    found = run_any_world_size([1, 2], 3, [OURS])
    assert found[OURS][2].differing == [0.0] * 3 == found[OURS][2].largest
    assert found[OURS][2].losses == found[OURS][1].losses
    assert found[OURS][1].losses[-1] < found[OURS][1].losses[0]
    found["peer"] = {1: found[OURS][1], 2: Run([5.0, 4.0, 3.0], [0.7, 0.8, 0.9], [1e-5] * 3)}
    table = Console(width=120)
    with table.capture() as said:
        table.print(any_world_size_table(found))
    assert said.get().count("none") == 3 and "90.0 %, up to 1e-05" in said.get()
    draw_any_world_size(found, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"must divide 12 micro-batches, got \[5\]"):
        run_any_world_size([1, 5], 3)


def test_a_step_of_every_kind_of_engine_is_timed_and_drawn(tmp_path: Path) -> None:
    results = tmp_path / "step.json"
    model = "--layers=1 --width=64 --context=16 --rounds=1 --steps=1".split()
    words = ["compute", "Belief ZeRO-2", "DDP +", "FSDP2", "DeepSpeed ZeRO-2"]
    names = chosen_engines(words)
    assert len({getattr(ENGINES[name], "func", ENGINES[name]) for name in names}) == 5
    done = run("step", *model, f"--only={json.dumps(words)}", f"--json={results}")
    assert done.returncode == 0, done.stderr
    result = json.loads(results.read_text())["step"]
    assert [row["name"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert row["median_ms"] > 0 and row["phases_ms"]["backward"] > 0
        assert row["name"] in done.stdout
    done = run("markdown", f"--files=[{results}]")
    assert done.returncode == 0, done.stderr
    assert all(f"{name} | " in done.stdout.replace("**", "") for name in names)
    picture = tmp_path / "step.png"
    done = run("plot", f"--files=[{results}]", f"--out={picture}")
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_shared_memory_is_timed_beside_messages_and_soaks() -> None:
    results = run_host(ranks=2, mib=1, rounds=1)
    transport, small = results["transport"], results["small"]
    assert len(transport.rows) == 7 and len(small.rows) == 3
    assert all(row.median > 0 for row in (*transport.rows, *small.rows))
    first, *_, last = run_soak(ranks=2, steps=200)
    # What every step left behind would show by the hundreds.
    assert last["descriptors"] == first["descriptors"] and last["threads"] <= first["threads"]
    assert last["mappings"] - first["mappings"] < 20


@pytest.mark.parametrize(
    "case, kept",
    [
        (Case("ShardedAdaBelief", "agreement", "killed", 5), True),
        # Gathers after one that has not started would be taken for it.
        (Case("ShardedAdaBelief, messages", "gather", "raises", 36), None),
    ],
)
def test_a_rank_is_ended_and_what_the_others_notice_is_told(case: Case, kept: bool | None) -> None:
    outcome = run_case(case)
    assert outcome.seconds is not None and outcome.names_victim and outcome.kept is kept


def test_cases_of_faults_are_every_phase_and_way() -> None:
    found = cases(seeds=2, only=["messages", "FSDP2"])
    assert len(found) == 2 * len(WAYS) * (15 + 3)
    assert found == cases(seeds=2, only=["messages", "FSDP2"])


def test_deepspeed_is_timed_by_the_same_json(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(2, 1, 1, 64, 1, 16, "float32")
    turns: list[str] = []

    def take(name: str, *arguments: Any) -> Turn:
        turns.append(name)
        sharded = "Sharded" in name
        return take_turn(name, *arguments) if sharded else Turn([2.0], {}, len(turns), None)

    monkeypatch.setattr(step, "take_turn", take)
    found = run_by_json(work, 2, ["ZeRO-1", "offload"])
    names = [name for setup in found for name in BY_JSON[setup]]
    assert turns == names * 2 and len(names) == 7
    first, *offloaded = found.values()
    adamw, ours, sharded = first.rows
    assert first.ratio(ours, adamw.name) == 1.0 and ours.peak_mib == 5.5  # median of 2 and 9
    assert len(sharded.seconds) == 2 and sharded.phases.keys() == {"forward", "backward", "step"}
    assert [len(result.rows) for result in offloaded] == [2, 2]
    with pytest.raises(ValueError, match="is in no setup's name: DeepSpeed ZeRO-1; "):
        run_by_json(work, 1, ["ZeRO-4"])


def test_mpi_and_gloo_take_turns(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    tables = tmp_path / "tables.md"
    model = "--layers=1 --width=64 --context=16 --rounds=1 --steps=1".split()
    done = run("mpi", "--ranks=[2]", "--megabytes=[1]", *model, f"--markdown={tables}")
    assert done.returncode == 0, done.stderr
    rows = [line for line in tables.read_text().splitlines() if line.startswith("| ")]
    for row in (
        "| all_to_all, 1 MB | ",
        "| all_gather, mpi4py | ",
        "| ShardedAdaBelief over gloo | ",
    ):
        (cells,) = [line.removeprefix(row).split(" | ") for line in rows if line.startswith(row)]
        assert all(float(cell.rstrip("% |")) > 0 for cell in cells[:2])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["step", "--only=[apex]"], "is in no engine's name: compute only; "),
        (["step", "--ranks=2", "--dtype=float16"], "float16"),
        (["draw"], "draw"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0
    assert message in done.stderr


def test_errors_of_smaller_states_are_measured(tmp_path: Path) -> None:
    results, table, picture = (tmp_path / f"found.{end}" for end in ("json", "md", "png"))
    size = "--elements=512 --steps=20 --decades=[0] --eps=[1e-16] --recorded_steps=1".split()
    out = [f"--json={results}", f"--markdown={table}", f"--picture={picture}"]
    done = run("accuracy", *size, "--recorded_elements=256", *out)
    assert done.returncode == 0, done.stderr
    recorded, synthetic, small_steps = json.loads(results.read_text())["accuracy"]
    for name, errors in synthetic["rows"].items():
        assert name in done.stdout and name in table.read_text()
        low = not any(part in name for part in ("8-bit", "bf16 states", "remainder8", CONTROL))
        assert (errors["update"]["p99"] < 1e-5) == low, name
    # Unbiased, where to nearest nothing moves.
    ways = {name: errors["way"] for name, errors in small_steps["rows"].items()}
    assert abs(ways["bf16 params, remainder8"] - 1.0) < 0.5
    assert ways["control: remainder8 to nearest"] == 0.0
    # FullState masters and halves are the same numbers.
    assert recorded["rows"]["float32"] == recorded["rows"]["bf16 params, remainders"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_main_job_trains_in_other_modes(tmp_path: Path) -> None:
    results, table, picture = (tmp_path / f"found.{end}" for end in ("json", "md", "png"))
    model = ["--layers=1", "--width=32", "--context=32", "--batch=4"]
    modes = "[float32, 8-bit states]"
    out = [f"--json={results}", f"--markdown={table}", f"--picture={picture}"]
    size = ["--steps=2", "--seeds=1", f"--modes={modes}", f"--arguments={json.dumps(model)}"]
    done = run("smallstates", *size, *out)
    assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text())["smallstates"]
    assert found["evaluated"] == [1, 2]
    assert all(len(runs["held_out"]) == 1 for runs in found["modes"].values())
    assert "8-bit states" in table.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_many_groups_beside_one() -> None:
    done = run("groups", "--count=20", "--rounds=2", "--sizes=[10]")
    assert done.returncode == 0, done.stderr
    for name in ("ShardedAdaBelief", "AdaBelief", "AdamW", "20 groups"):
        assert name in done.stdout


def test_resumed_runs_are_compared_part_by_part(tmp_path: Path) -> None:
    runs = {
        name: [{"step": step, "loss": 1.0 / step + shift * (step > 4)} for step in range(1, 9)]
        for name, shift in (("resumed", 0.25), ("uninterrupted", 0.0))
    }
    parts = compare_runs(runs)
    assert [(part.first, part.last, part.ranks, part.equal) for part in parts] == [
        (1, 2, 4, 2),
        (3, 4, 3, 2),
        (5, 6, 1, 0),
        (7, 8, 4, 0),
    ]
    assert [round(part.largest_difference, 9) for part in parts] == [0, 0, 0.25, 0.25]
    draw_resume(runs, tmp_path / "resume.png")
    assert (tmp_path / "resume.png").read_bytes().startswith(b"\x89PNG")


def test_habits_are_tried_under_a_peer() -> None:
    """A slice of `python -m benchmarks habits`; what it says of ours is tested elsewhere."""
    assert run_habit("DDP", "`p.grad.mul_` after backward") == "as one process"
    assert run_habit("stage=2", "`p.grad.mul_` after backward").startswith("error: RuntimeError")
    assert table({"x": dict.fromkeys(PEERS, "y")}).splitlines()[2].count("y") == len(PEERS)


def test_flipped_bits_are_caught_where_they_are_watched() -> None:
    rows = run_flips(40, seed=1)
    assert sum(row["flips"] for row in rows) == 40 and len(rows) == 5
    for row in rows:
        caught = 0 if row["flipped"] == "gradient" else row["flips"]
        assert (row["caught"], row["rank named"]) == (caught, caught), row


def test_a_run_through_failures_has_the_bits_of_one_without() -> None:
    found = run_through_failures(steps=150, between=50, every=5, seed=2)
    assert found["failures"] >= 2
    assert (found["hangs"], found["same bits"]) == (0, True)
