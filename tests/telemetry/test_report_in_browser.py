"""The report of a real run as a browser shows it: drawn, legible, and inside the window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from belief_dist import ShardedAdaBelief
from belief_dist.telemetry import StepMonitor
from belief_dist.telemetry.report import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: tests/install.sh")

# Asked of the page when it is laid out; the answer is read from the document.
MEASURE = """<script>
const boxes = [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
document.body.dataset.found = JSON.stringify({
    page: document.documentElement.scrollWidth, window: document.documentElement.clientWidth,
    pictures: boxes.map(box => [box.left, box.top, box.right, box.bottom]),
    texts: [...document.querySelectorAll("svg text")].filter(each =>
        each.getBoundingClientRect().width > 0).map(each => each.textContent),
    rows: document.querySelectorAll(".numbers tr").length,
});
</script>"""


def train(folder: Path) -> Path:
    """Train a small model on this process, with a skipped step, and return its page."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    optimizer = ShardedAdaBelief(groups, lr=1e-2)
    monitor = StepMonitor(optimizer, folder / "metrics.jsonl", every=2, per_parameter=True)
    for step in range(1, 25):
        loss = model(torch.randn(16, 8)).square().mean() * (float("nan") if step == 9 else 1.0)
        loss.backward()
        optimizer.step()
        monitor.log(step, loss=loss)
        optimizer.zero_grad()
    (folder / "step-00000010").mkdir()
    return write_report(folder)[0]


def browse(*arguments: str, width: int, profile: Path) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
    command += ["--disable-component-update", "--hide-scrollbars", f"--user-data-dir={profile}"]
    command += [f"--window-size={width},3000", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def laid_out(page: Path, width: int, profile: Path) -> dict[str, Any]:
    measured = page.with_name("measured.html")
    measured.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    document = browse("--dump-dom", measured.as_uri(), width=width, profile=profile)
    (found,) = re.findall(r'data-found="([^"]*)"', document)
    parsed: dict[str, Any] = json.loads(found.replace("&quot;", '"').replace("&amp;", "&"))
    return parsed


def test_pages_are_drawn_and_fit_the_window(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    run, profile = tmp_path / "run", tmp_path / "profile"
    run.mkdir()
    page = train(run)
    found = laid_out(page, 1280, profile)
    assert found["page"] <= found["window"] == 1280
    # Loss, lr, norm, update, four bands, eps, time, memory, three maps.
    assert len(found["pictures"]) == 14 and found["rows"] == 5
    expected = {"Loss", "Signal of group1: |m| / sqrt(s)", "5 to 95 % of weights", "update"}
    expected |= {"2.bias", "Median surprise, by parameter", "resident_peak"}
    assert expected <= set(found["texts"])
    browse(f"--screenshot={tmp_path / 'page.png'}", page.as_uri(), width=1280, profile=profile)
    shown = image.imread(tmp_path / "page.png")[..., :3]
    assert shown.shape[:2] == (3000, 1280)
    assert 0.02 < (shown < 0.97).any(axis=-1).mean() < 0.6  # neither blank nor black
    for left, top, right, bottom in found["pictures"]:
        assert 0 <= left < right <= 1280 and right - left > 300 and bottom - top > 150
        part = shown[int(top) : int(bottom), int(left) : int(right)]
        assert (part < 0.97).any(axis=-1).mean() > 0.01

    # It goes on: a record is being written; and the window is a phone's.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "lo')
    found = laid_out(write_report(run)[0], 500, profile)
    assert found["page"] <= found["window"] == 500
    assert len(found["pictures"]) == 14
