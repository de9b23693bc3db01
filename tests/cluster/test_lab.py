"""The lab itself: it ends with its process, and the next one removes what is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import Lab, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

KILLED = """
import os, pathlib, sys
from lab import Lab
with Lab(2, pathlib.Path(sys.argv[1]), "belief-test") as lab:
    job = lab.job({0: ["ssh", "node1", "sleep", "1000"]}, os.environ, lab.folder, 100)
    while not any("sleep" in command for command in lab.nodes[1].pids().values()):
        pass
    print(*lab.pids(), *(node.pid for node in lab.nodes), flush=True)
    sys.stdin.read()
"""


def test_a_killed_lab_leaves_no_process_and_the_next_one_removes_the_rest(tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    (tmp_path / "next").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed")],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pids = process.stdout.readline().split()
        process.send_signal(signal.SIGKILL)
    assert len(pids) > 4
    deadline = time.monotonic() + 5
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "processes outlive the lab"
        time.sleep(0.02)

    made = Lab(2, tmp_path / "next", "belief-test")
    assert made.left_over() != []
    with made as lab:
        assert lab.nodes[0].run("ssh", "node1", "hostname").strip() == "node1"
    assert made.left_over() == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
