"""What is wrong in hostfiles and `.deepspeed_env` files, and what the launcher makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belief_dist import cli
from belief_dist.deepspeed_launcher_files import FileReport, check_environment, check_hostfile
from tests.harness.paths import ROOT


class Case(NamedTuple):
    lines: list[str]
    told: list[str]  # the beginning of each finding
    corrected: list[str] | None = None  # None: as it was


HOSTFILES = [
    Case(["# two", "", "node0 slots=8", "node1 slots=8 max-slots=8"], []),
    Case(
        ["node0"], ["line 1: must be \"HOST slots=RANKS\", got 'node0', which the launcher refuses"]
    ),
    Case(
        ["node0:8", "node1 slots = 8", "node2 8"],
        ['line 1: must be "HOST slots=RANKS"', "line 2: must be", "line 3: must be"],
        ["node0 slots=8", "node1 slots=8", "node2 slots=8"],
    ),
    Case(
        ["node0 slots=8x"],
        ["line 1: must be \"HOST slots=RANKS\", got 'node0 slots=8x', which the launcher reads as"],
        ["node0 slots=8"],
    ),
    Case(["node0 slots=0"], ["line 1: gives node0 no ranks; give it at least 1, or remove it."]),
    Case(
        ["node0 slots=4", "node1 slots=8", "node0 slots=4"],
        ["line 3: names node0 a second time, which the launcher refuses; its slots are added up"],
        ["node0 slots=8", "node1 slots=8"],
    ),
    Case(
        ["localhost slots=8", "node1 slots=8"],
        ["line 1: localhost is another host for each of the others"],
    ),
    Case(["localhost slots=8"], []),
    Case(["# none"], ["the file: names no host"]),
]
ENVIRONMENTS = [
    Case(["NCCL_DEBUG=INFO", "A = b c"], [], ["NCCL_DEBUG=INFO", "A=b c"]),
    Case(
        ["# a comment", "", "# A=b", "A=b"],
        [
            "line 1: is a comment, and the launcher ends in a traceback",
            "line 2: is empty, and the launcher ends in a traceback",
            "line 3: is a comment, and the launcher exports it as a variable",
        ],
        ["A=b"],
    ),
    Case(["NCCL_DEBUG"], ["line 1: must be NAME=VALUE, got 'NCCL_DEBUG'; the launcher ends"]),
    Case(["2A=b"], ["line 1: must be NAME=VALUE, got '2A=b'; the ranks' shells refuse."]),
    Case(["export A=b"], ["line 1: must be A=VALUE: the launcher writes export"], ["A=b"]),
    Case(["A='b c'"], ["line 1: quotes A, which the launcher does once more."], ["A=b c"]),
    Case(["A=$HOME/x"], ["line 1: has A=$HOME/x, which the shell of every rank expands"]),
    Case(["RANK=3"], ["line 1: sets RANK, which the launcher gives each rank"], []),
    Case(["HF_TOKEN=hf_x"], ["line 1: puts HF_TOKEN on command lines"]),
    Case(
        ["A=1", "B=2", "A=3"],
        ["line 3: sets A a second time, and the launcher takes this one; line 1 is left out."],
        ["B=2", "A=3"],
    ),
]


def assert_told(case: Case, report: FileReport) -> None:
    told = [f"{path}: {sentence}" for path, sentence, _ in report.findings]
    assert len(told) == len(case.told), told
    for found, expected in zip(told, case.told, strict=True):
        assert found.startswith(expected)
    assert report.corrected == (case.lines if case.corrected is None else case.corrected)
    if case.corrected is not None:
        assert all(each.is_fixed for each in report.findings)


@pytest.mark.parametrize("case", HOSTFILES, ids=lambda case: case.lines[0])
def test_hostfiles(case: Case) -> None:
    assert_told(case, check_hostfile(case.lines))


@pytest.mark.parametrize("case", ENVIRONMENTS, ids=lambda case: case.lines[0])
def test_environments(case: Case) -> None:
    assert_told(case, check_environment(case.lines))


@pytest.mark.deepspeed
@settings(deadline=None)  # the first call imports deepspeed
@given(
    st.lists(
        st.builds(
            "{}{}{}".format,
            st.sampled_from(["node0", "node1", "localhost", "#", ""]),
            st.sampled_from([" slots=", ":", " ", " slots = ", "\tslots="]),
            st.sampled_from(["8", "08", "x", "8 more", ""]),
        ),
        max_size=4,
    )
)
def test_the_launcher_takes_what_is_corrected(lines: list[str]) -> None:
    """And refuses no file in which nothing was found."""
    from deepspeed.launcher.runner import _parse_hostfile

    report = check_hostfile(lines)
    if all(each.is_fixed for each in report.findings):
        hosts = _parse_hostfile(report.corrected)
        assert hosts and check_hostfile(report.corrected).findings == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hostfile"
    path.write_text("node0:8\n")
    assert cli.main(["check", str(path)]) == 1
    assert "-node0:8\n+node0 slots=8\n" in capsys.readouterr().out
    assert cli.main(["check", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["corrected"] == ["node0 slots=8"]
    path = tmp_path / ".deepspeed_env"
    path.write_text("A=b\n")
    assert cli.main(["check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no mistakes were found\n"
    path.write_bytes(b"\xff")
    assert cli.main(["check", str(path)]) == 2
    assert "is no text file" in capsys.readouterr().err
    assert cli.main(["check"]) == 2
    assert cli.main(["check", str(ROOT / "launch" / "hostfile.example")]) == 0
