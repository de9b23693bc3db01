"""`belief-dist` answers help and wrong command lines without torch, however it is started."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import _belief_dist_cli
from belief_dist import cli, commands
from belief_dist.checkpoint.formats import convert
from tests.harness.paths import ROOT

HEAVY = {"torch", "belief_dist", "numpy", "rich"}
ON_CHECKPOINTS = {"inspect", "verify", "diff", "convert"}
SAID_AT_ONCE = [
    (["--help"], 0),
    (["check", "--help"], 0),
    (["checkpoint", "--help"], 0),
    (["checkpoint", "convert", "--help"], 0),
    (["checkpoint", "convert", "a", "b", "--to", "nothing"], 2),
    (["nonsense"], 2),
]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.parametrize("arguments, status", SAID_AT_ONCE, ids=lambda each: str(each))
def test_what_needs_no_torch_imports_none(arguments: list[str], status: int) -> None:
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('heavy:', sorted({HEAVY!r} & set(sys.modules))))\n"
        "from _belief_dist_cli import main\n"
        "sys.exit(main())"
    )
    done = python("-c", code, *arguments)
    assert done.returncode == status, done.stderr
    assert done.stdout.endswith("heavy: []\n")
    assert ("usage: belief-dist" in done.stdout) if status == 0 else (done.stderr.count("\n") == 1)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0 and re.fullmatch(r"belief-dist [\w.]+\n", capsys.readouterr().out)


def test_a_table_that_goes_into_a_pipe_has_whole_names(capsys: pytest.CaptureFixture[str]) -> None:
    name = "layers." * 40
    commands._table(["tensor", "shape"], [[name, "2x4"]])
    assert capsys.readouterr().out.splitlines()[1] == f"{name}  2x4"


def test_every_spelling_is_the_same_command() -> None:
    said = [python("-m", name, "--help") for name in ("belief_dist", "belief_dist.cli")]
    assert [done.returncode for done in said] == [0, 0]
    assert said[0].stdout == said[1].stdout and "usage: belief-dist" in said[0].stdout
    assert cli.main is _belief_dist_cli.main


def test_the_installed_command_is_the_light_one() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert '\nbelief-dist = "_belief_dist_cli:main"\n' in project
    assert any("_belief_dist_cli" in line for line in project.splitlines() if "py-modules" in line)


def test_the_parser_knows_what_the_package_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert _belief_dist_cli.TARGETS == convert.TARGETS
    for action in commands.ACTIONS:
        words = ["checkpoint", action] if action in ON_CHECKPOINTS else [action]
        with pytest.raises(SystemExit) as left:
            cli.main([*words, "--help"])
        assert left.value.code == 0
        assert f"usage: belief-dist {' '.join(words)}" in capsys.readouterr().out
