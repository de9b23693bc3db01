"""`belief-dist migrate`: what a script or JSON becomes, shown and never written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import belief_dist
from belief_dist.deepspeed_config import check_config
from belief_dist.migrate import Migration, migrate
from tests.harness.paths import BIN


def script(tmp_path: Path, text: str) -> Migration:
    path = tmp_path / "train.py"
    path.write_text(text)
    found = migrate(path)
    assert path.read_text() == text
    return found


def optimizer_of(found: Migration) -> Any:
    """Run what a script has become, and return its optimizer."""
    names: dict[str, Any] = {"model": nn.Linear(3, 2)}
    exec(compile(found.after, "train.py", "exec"), names)
    assert type(names["optimizer"]) is belief_dist.AdaBelief
    return names["optimizer"]


SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "import torch\noptimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, eps=1e-8)\n": (
        "AdamW's decay is written out",
        {"lr": 3e-4, "eps": 1e-16, "weight_decay": 0.01, "weight_decouple": True},
    ),
    "from torch import optim as o\noptimizer = o.Adam(model.parameters(), 2e-3, (0.8, 0.9))\n": (
        "by position",
        {"lr": 2e-3, "betas": (0.8, 0.9), "weight_decay": 0.0},
    ),
    (
        "from torch.optim import Adam\n"
        "optimizer = Adam(model.parameters(), weight_decay=0.1, fused=None)\n"
    ): ("Adam adds its decay to the gradient", {"weight_decay": 0.1, "weight_decouple": False}),
    (
        '"""Trains."""\nfrom __future__ import annotations\nimport os, torch.optim\n'
        "more = {'weight_decay': 0.2}\n"
        "optimizer = torch.optim.AdamW(\n    [  # all\n        *model.parameters(),\n    ],\n"
        "    lr=1e-3 * 2,  # twice\n    **more,\n)\nprint('ä')\n"
    ): ("over several lines", {"lr": 2e-3, "weight_decay": 0.2}),
    (
        "def build(params):\n    from torch.optim import AdamW\n"
        "    return AdamW(params, weight_decay=0, amsgrad=True)\n"
        "optimizer = build(model.parameters())\n"
    ): ("inside of a function", {"weight_decay": 0, "amsgrad": True}),
}


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_script_becomes_one_that_runs(text: str, tmp_path: Path) -> None:
    about, expected = SCRIPTS[text]
    found = script(tmp_path, text)
    group = optimizer_of(found).param_groups[0]
    assert {name: group[name] for name in expected} == expected, about
    assert any("eps" in note.text for note in found.notes)
    unchanged = [line for line in text.splitlines() if line in found.after.splitlines()]
    assert len(unchanged) >= len(text.splitlines()) - 8


def test_the_official_package_keeps_its_rectification(tmp_path: Path) -> None:
    text = (
        "from adabelief_pytorch import AdaBelief\noptimizer = AdaBelief(model.parameters(), "
        "lr=1e-3, eps=1e-12, weight_decouple=False, print_change_log=False)\n"
    )
    found = script(tmp_path, text)
    group = optimizer_of(found).param_groups[0]
    assert group["rectify"] and group["eps"] == 1e-12 and not group["weight_decouple"]
    assert any("rectify=True is the official" in note.text for note in found.notes)
    assert any("print_change_log" in note.text for note in found.notes)


def test_what_is_near_an_optimizer_is_told(tmp_path: Path) -> None:
    text = (
        "import torch\nfrom torch.nn.parallel import DistributedDataParallel as DDP\n"
        "from torch.distributed.optim import ZeroRedundancyOptimizer\n"
        "model = DDP(model)\n"
        "optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)\n"
        "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n"
    )
    found = script(tmp_path, text)
    assert found.diff() == ""
    assert [note.line for note in found.notes] == [4, 5, 6]
    assert "max_grad_norm" in found.notes[2].text


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    text = "from mine import AdamW\nimport torch\nAdamW(1)\ntorch.optim.SGD(model.parameters())\n"
    assert script(tmp_path, text) == Migration(text, text, [], "train.py")
    starred = "import torch\nargs = [1]\noptimizer = torch.optim.AdamW(*args)\n"
    found = script(tmp_path, starred)
    assert found.diff() == "" and "by hand" in found.notes[0].text


def test_a_deepspeed_json(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    params = {
        "lr": 1e-4,
        "eps": 1e-8,
        "adam_w_mode": False,
        "torch_adam": True,
        "weight_decay": 0.1,
    }
    given = {
        "train_batch_size": 8,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam", "params": params},
    }
    path.write_text(json.dumps(given))
    found = migrate(path)
    changed = json.loads(found.after)
    assert changed["optimizer"] == {
        "type": "AdaBelief",
        "params": {"lr": 1e-4, "weight_decay": 0.1, "weight_decouple": False},
    }
    assert check_config(changed).findings == []
    assert any("torch_adam" in note.text for note in found.notes)
    path.write_text(json.dumps({"optimizer": {"type": "Lion"}}))
    assert migrate(path).diff() == ""


@pytest.mark.parametrize("content", [b"\xff\xfe", b"def (", b"x = 1\x00", b"(" * 5000])
def test_no_script(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is no Python script|is no text file|nested too deeply"):
        migrate(path)


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("import torch\nopt = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())\n")
    run = [sys.executable, "-m", "belief_dist", "migrate", str(path)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=BIN)
    assert done.returncode == 0, done.stderr
    assert "+opt = belief_dist.AdaBelief(" in done.stdout and f"{path}:2: Adam's eps" in done.stdout
    found = json.loads(subprocess.run([*run, "--json"], capture_output=True, cwd=BIN).stdout)
    assert found["notes"][0]["line"] == 2 and found["diff"].startswith("--- train.py")
    path.write_text("print(1)\n")
    done = subprocess.run(run, capture_output=True, text=True, cwd=BIN)
    assert done.returncode == 1 and "no Adam, AdamW or adabelief-pytorch" in done.stdout
