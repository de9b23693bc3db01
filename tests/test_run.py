"""`python -m belief_dist.run` is `python`, but with AdaBelief registered when autoload is off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, pickle, sys
import helper  # lies beside the script
import torch
class Own: pass
print(json.dumps({
    "argv": sys.argv[1:], "argv0": os.path.abspath(sys.argv[0]), "path": sys.path[0],
    "name": __name__, "file": __file__,
    "pickles": isinstance(pickle.loads(pickle.dumps(Own())), Own),
    "known": hasattr(torch.optim, "adabelief"),
}))
if "exit" in sys.argv: sys.exit(7)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "helper.py").touch()
    return tmp_path


def python(folder: Path, *arguments: str) -> tuple[int, str, str]:
    environment = os.environ | {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "command", [["scripts/train.py"], ["-m", "scripts.train"]], ids=["script", "module"]
)
def test_all_is_as_under_python_but_the_name_is_known(folder, command):
    if command[0] == "-m":
        (folder / "helper.py").touch()
    status, plain, _ = python(folder, *command, "--steps", "3", "exit")
    assert status == 7
    status, ours, errors = python(
        folder, "-m", "belief_dist.run", "--local_rank=1", *command, "--steps", "3", "exit"
    )
    assert status == 7, errors
    expected = json.loads(plain)
    assert not expected["known"] and expected["argv"] == ["--steps", "3", "exit"]
    expected |= {"known": True, "argv": ["--local_rank=1", "--steps", "3", "exit"]}
    assert json.loads(ours) == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "usage: python -m belief_dist.run"),
        (["--verbose", "train.py"], "usage: python -m belief_dist.run"),
        (["absent.py"], "there is no script 'absent.py' in"),
    ],
)
def test_nothing_to_run(folder, arguments, sentence):
    status, output, errors = python(folder, "-m", "belief_dist.run", *arguments)
    assert (status, output) == (2, "")
    assert sentence in errors
