"""`make gpu` without a GPU: its runner, its files, and each of its sections on a CPU."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report, timing
from benchmarks.gpu.cases import SMALL
from benchmarks.gpu.contenders import OURS
from benchmarks.gpu.one_of_eight import alone
from benchmarks.gpu.runner import Ran, Section, run_sections
from benchmarks.gpu.sections import SECTIONS
from tests.harness.paths import ROOT

BROKEN = Section("broken", "Everything breaks", "tests.harness.gpu_sections", 250, 5, "About it.")
PEERS = Section("peers", "Peers", "tests.harness.gpu_peers", 60, 30)
ABSENT = Section("absent", "No such module", "tests.harness.no_such_module", 60, 30)

# On a machine that other tests keep busy.
REHEARSAL = ["--device=cpu", "--size=small", "--patience=9", "--seconds=1000"]


def options(folder: Path, seconds: float = 300) -> argparse.Namespace:
    return argparse.Namespace(
        out=folder, device="cpu", size="small", seconds=seconds, commit="abcdef"
    )


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1100,
    )


def test_what_breaks_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run([BROKEN, ABSENT, PEERS], options(tmp_path)) == 1
    told = capsys.readouterr()
    assert told.err == "Failed: broken, absent\n" and "differs two" in told.out
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["machine"]["commit"] == "abcdef" and content["machine"]["torch"]
    assert set(content["packages"]) == set(report.OPTIONAL)
    broken, absent, peers = content["sections"]
    rows = {row["name"]: row for row in broken["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "ok",
        "missing": "missing",
        "raises": "failed",
        "a peer raises": "failed",
        "dies": "failed",
        "hangs": "failed",
        "one": "ok",
        "two": "differs",
        "last": "ok",
    }
    assert rows["good"]["ms"] == 1.25 and rows["good"]["device"] == "cpu"
    assert rows["missing"]["note"] == "no_such_package not installed"
    assert rows["raises"]["note"].startswith("RuntimeError: a | pipe ... and a second line (gpu_")
    assert rows["dies"]["note"] == "died by SIGSEGV: these are its last words"
    assert rows["hangs"]["note"].startswith("ran out of time")
    assert rows["last"]["elements"] == SMALL.elements
    assert [broken["failed"], absent["failed"], peers["failed"]] == [True, True, False]
    assert "No module named" in absent["rows"][0]["note"]

    text = (tmp_path / "gpu.md").read_text()
    assert "| good | 1.25 | yes | cpu | ok |" in text
    assert "| raises | - | - | - | failed: RuntimeError: a \\| pipe ... and a second" in text
    assert "## Everything breaks\n\nAbout it.\n\n### A table\n\n|  | ms |" in text
    assert "| good | 2000 | ok |" in text  # four figures are shown whole
    lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    assert all(line[-1] == "" for line in lines)


def test_peers_that_fail_fail_nothing(tmp_path: Path) -> None:
    assert command.run([PEERS], options(tmp_path)) == 0


def test_without_time_sections_are_listed(tmp_path: Path) -> None:
    saved: list[list[Ran]] = []
    found = run_sections(
        [BROKEN, PEERS], "cpu", "small", tmp_path, 0, print, lambda some: saved.append([*some])
    )
    assert [len(some) for some in saved] == [1, 2]  # what is there is written after each
    assert not any(ran.rows or ran.failed for ran in found)
    text = report.markdown({}, report.packages(), found)
    assert text.count("Not run: no time was left.") == 2


def test_a_section_ends_when_its_time_does(tmp_path: Path) -> None:
    short = BROKEN._replace(seconds=10, case_seconds=60)
    (ran,) = run_sections([short], "cpu", "small", tmp_path, 300, print, lambda some: None)
    assert ran.seconds < 40 and ran.note.startswith("The section ran out of time")
    assert ran.failed


def test_missing_packages_are_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "OPTIONAL", {"torch": "all", "no_such_package": "nothing"})
    present = report.packages()
    assert present["no_such_package"] is None
    text = report.markdown({"card": "none"}, present, [])
    assert "| no_such_package | missing | nothing |" in text and "| card | none |" in text
    assert f"| torch | {present['torch']} | all |" in text


def test_only_names_sections() -> None:
    assert [section.name for section in command.choose("graph,forms")] == ["graph", "forms"]
    assert command.choose(None) == SECTIONS
    with pytest.raises(ValueError, match="--only has speed; sections are forms, sums,"):
        command.choose("speed")
    done = run_command("--only=nothing", "--device=cpu")
    assert done.returncode == 2 and "--only has nothing" in done.stderr


def test_what_an_image_of_torch_lacks_is_not_imported() -> None:
    """Neither the command nor a section needs more than torch, numpy and pytest."""
    code = (
        "import importlib, sys\n"
        "for name in 'deepspeed jsonargparse lightning rich tqdm transformers'.split():\n"
        "    sys.modules[name] = None\n"
        "import benchmarks.gpu.__main__ as command\n"
        "from benchmarks.gpu.cases import FULL\n"
        "for section in command.SECTIONS:\n"
        "    assert importlib.import_module(section.module).cases('cuda', FULL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_are_unique() -> None:
    """A process that goes on behind a case leaves out what has its name."""
    for section in SECTIONS:
        names = [case.name for case in importlib.import_module(section.module).cases("cpu", SMALL)]
        assert len(set(names)) == len(names), section.name


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Give what each section has found on a CPU, all run by one command."""
    folder = tmp_path_factory.mktemp("rehearsal")
    done = run_command(*REHEARSAL, f"--out={folder}")
    file = folder / "gpu.json"
    assert file.exists(), done.stdout + done.stderr
    sections = {section["name"]: section for section in json.loads(file.read_text())["sections"]}
    failed = [name for name, section in sections.items() if section["failed"]]
    assert done.returncode == bool(failed), done.stdout + done.stderr
    return sections


@pytest.mark.parametrize("name", [s.name for s in SECTIONS if s.name != "frameworks"])
def test_each_section_runs_on_a_cpu(rehearsed: dict[str, dict[str, Any]], name: str) -> None:
    """The same lines as on a GPU, but for events, graphs and NCCL."""
    section = rehearsed[name]
    assert section["rows"] and section["note"] == "" and not section["failed"]
    bad = [row for row in section["rows"] if row["status"] not in ("ok", "missing")]
    assert not bad


@pytest.mark.deepspeed
def test_frameworks_run_on_a_cpu(rehearsed: dict[str, dict[str, Any]]) -> None:
    """DeepSpeed's engine at every stage; the examples have tests of their own."""
    from benchmarks.gpu import frameworks

    assert frameworks.cases("cuda", SMALL) and frameworks.cases("cpu", SMALL)
    assert not rehearsed["frameworks"]["failed"]
    rows = {row["name"]: row for row in rehearsed["frameworks"]["rows"]}
    assert "AdaBelief runs under DeepSpeedEngine" in rows["AdaBelief, ZeRO-2, bf16"]["verify"]


def test_one_of_eight_holds_an_eighth() -> None:
    model = SMALL.step.model(torch.float32, "cpu")
    with alone(8):
        contender = OURS["ShardedAdaBelief, fp32 masters"](model, "cpu")
    assert contender.optimizer.comm.world_size == 8
    held = sum(s["exp_avg"].numel() for s in contender.optimizer.state.values())
    count = sum(p.numel() for p in model.parameters())
    assert held < count / 8 + 1024
    for _ in range(3):
        contender.iterate(SMALL.step.tokens("cpu"))
    contender.optimizer.wait_pending()
    assert contender.skipped() == 0


def test_medians_and_kernels() -> None:
    calls: list[int] = []
    taken = timing.median(lambda: calls.append(1), "cpu", 3, before=lambda: calls.append(0), warm=2)
    assert calls == [0, 1] * 5 and taken.total == taken.host >= 0
    assert timing.kernels_of(lambda: calls.append(2), "cpu") == (0, 0.0)
    assert timing.synchronizing(lambda: calls.append(3), "cpu") == "no GPU" and calls[-1] == 3


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        assert self.time

    def elapsed_time(self, other: _Event) -> float:
        return (other.time - self.time) * 1e3


def test_on_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of timing that a CPU leaves out, with what torch.cuda has in their place."""
    calls: list[str] = []

    def pretend(name: str, result: Any = None) -> None:
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(
            torch.cuda, name, lambda *given: calls.append(f"{name}{given}") or result
        )

    assert hasattr(torch.cuda, "Event") and hasattr(torch.cuda, "_sleep")
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    for name in ("synchronize", "_sleep", "reset_peak_memory_stats", "set_sync_debug_mode"):
        pretend(name)
    pretend("memory_allocated", 5)
    pretend("max_memory_allocated", 9)
    taken = timing.median(lambda: time.sleep(0.001), "cuda", 3, ahead=True)
    assert 0 < taken.total <= taken.host and any(c.startswith("_sleep") for c in calls)
    memory = timing.Memory("cuda")
    assert memory.held() == 0 and memory.peak() == 4

    def wait() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    def fail() -> None:
        raise RuntimeError("out of memory")

    calls.clear()
    assert timing.synchronizing(lambda: None, "cuda") == "none"
    assert calls[1:] == ["set_sync_debug_mode('error',)", "set_sync_debug_mode('default',)"]
    assert timing.synchronizing(wait, "cuda").startswith("test_gpu_report.py:")
    with pytest.raises(RuntimeError, match="out of memory"):
        timing.synchronizing(fail, "cuda")
    assert calls[-1] == "set_sync_debug_mode('default',)"


def test_a_case_that_loses_the_gpu_ends_its_process(tmp_path: Path) -> None:
    """Its row stays, and the next case has a process of its own."""
    lost = BROKEN._replace(name="lost", module="tests.harness.gpu_lost")
    (ran,) = run_sections([lost], "cuda", "small", tmp_path, 300, print, lambda some: None)
    assert [(row["name"], row["status"]) for row in ran.rows] == [("loses", "failed"), ("on", "ok")]
