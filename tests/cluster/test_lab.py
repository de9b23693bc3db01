"""The lab itself: it ends with its process, and it leaves the user's home alone."""

from __future__ import annotations

import os
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


# In a mount namespace where the user's home is another folder, for the whole of a lab.
AT_HOME = """
set -e
mount --bind "$1" /etc/passwd
bash --login -c :
exec "$2" -c "$3" "$4"
"""
LOGIN = """
import pathlib, sys
from lab import Lab
with Lab(2, pathlib.Path(sys.argv[1]), "belief-home") as lab:
    print(lab.nodes[0].run("ssh", "node1", "pwd; echo $HOME; ls -A; touch written").strip())
    print(lab.nodes[0].run("bash", "--login", "-c", "echo ~; ssh node1 'bash --login -c pwd'"))
"""


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    files = [folder, *folder.rglob("*")]
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.stat().st_size) for f in files}


def test_logins_neither_read_nor_change_the_users_home(tmp_path: Path) -> None:
    home, folder, passwd = (tmp_path / name for name in ("user", "lab", "passwd"))
    folder.mkdir()
    (home / ".ssh").mkdir(parents=True)
    read = tmp_path / "read"
    for name in (".bashrc", ".bash_profile", ".bash_login", ".profile", ".ssh/rc"):
        (home / name).write_text(f"echo {name} >>{read}\n")
    (home / ".ssh" / "config").write_text("Host *\n  ProxyCommand false\n")
    passwd.write_text(f"root:x:0:0:root:{home}:/bin/bash\nsshd:x:1:65534::/run/sshd:/bin/false\n")
    before = contents(home)
    inside = ["bash", "-c", AT_HOME, "at-home", passwd, sys.executable, LOGIN, folder]
    done = subprocess.run(
        ["unshare", "--mount", *map(str, inside)],
        cwd=Path(__file__).parent,
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    theirs = str(folder / "home")
    assert done.stdout.split() == [theirs] * 4
    assert (folder / "home" / "written").exists()
    # By the shell before the lab, whose home it is.
    assert read.read_text() == ".bash_profile\n"
    assert contents(home) == before
