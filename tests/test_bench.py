"""`belief-dist bench` measures what an update moves; how fast that is here, no test can know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from belief_dist import cli
from belief_dist.bench import measure


def test_bytes_are_those_of_each_form() -> None:
    found = measure(1 << 16, torch.device("cpu"))
    moved = {each.form: each.per_param for each in found.updates}
    assert moved == {
        "float32": 4 + 2 * (4 + 8),  # the gradient; parameter, m and s
        "float32, bfloat16 states": 4 + 2 * (4 + 4),
        "float32, 8-bit states": 4 + 2 * (4 + 2 + 2 / 256),
        "bfloat16, float32 masters": 2 + 2 + 2 * (4 + 8),  # and the parameter, which is written
        "bfloat16, remainders": 2 + 2 * (2 + 2 + 8),
        "bfloat16, remainders, 8-bit states": 2 + 2 * (2 + 2 + 2 + 2 / 256),
        "bfloat16, remainders of 8 bits, 8-bit states": 2 + 2 * (2 + 1 + 2 + 2 / 256),
    }
    for each in found.updates:
        rate = each.per_param / each.seconds
        assert each.share == pytest.approx(rate / found.memory) and each.share > 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "bench.png"
    assert cli.main(["bench", "--elements", "1e5", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "memory is read and written at" in out and "float32, 8-bit states" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["bench", "--elements", "1e5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["elements"] == 100_000
    assert cli.main(["bench", "--elements", "0"]) == 2
    assert "--elements must be 1 to 1e12, got 0" in capsys.readouterr().err
