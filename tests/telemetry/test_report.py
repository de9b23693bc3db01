"""`belief-dist report`: a page that needs nothing else, also of a run that goes on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from belief_dist import cli
from belief_dist.telemetry import JsonLines
from belief_dist.telemetry.events import find_events
from belief_dist.telemetry.records import parse_records


def write(folder: Path, steps: range) -> None:
    sink = JsonLines(folder / "metrics.jsonl")
    for step in steps:
        values = {
            "loss": float("nan") if step == 30 else 1 / step,
            "skipped_steps": int(step >= 30),
            "lr/group0": 1e-3,
            "lr/group1": 1e-4,
            "l2_norm/grad/global": 2.0,
            "update_to_weight/group0": 1e-3,
            "belief/signal/group0": 0.3,
            "belief/surprise/group0": 0.9,
            "time/seconds_per_step": 0.1,
        }
        sink(step, values | ({"why_skipped": "a <spike>"} if step == 30 else {}))


def write_skips(path: Path) -> None:
    """Add a record of four more skipped steps, of which two are told, and others wrongly."""
    told = [
        {"step": 51, "kind": "repair", "why": "copies differed"},
        {"step": 53, "kind": "spike", "why": "far too large"},
    ]
    JsonLines(path)(60, {"skipped_steps": 5, "skips": [*told, {"step": "x"}, 7]})
    JsonLines(path)(70, {"skips": None, "time/optimizer_step": None, "time/step/update": None})


def test_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, range(10, 60, 10))
    (tmp_path / "step-00000020").mkdir()
    (tmp_path / ".saving-step-00000050").mkdir()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')  # it is being written
    assert cli.main(["report", str(tmp_path)]) == 0
    page = tmp_path / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    text = page.read_text()
    assert "step 50" in text and "checkpoint step-00000020" in text
    assert "1 steps skipped since the record before: a &lt;spike&gt;" in text
    assert ".saving" not in text
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 7  # nothing was told about eps
    for picture in pictures:
        ElementTree.fromstring(picture)
    # Nothing is loaded from elsewhere: what is left of addresses are names in XML.
    addresses = set(re.findall(r"https?://[^\"' ]+", text))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img|iframe)", text)


def test_another_place_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, range(10, 20, 10))
    (tmp_path / "step-00000010").mkdir()
    out = tmp_path / "page.html"
    place = [str(tmp_path / "metrics.jsonl"), "--out", str(out)]
    assert cli.main(["report", *place, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    saved = {"step": 10, "kind": "checkpoint", "what": "checkpoint step-00000010"}
    assert told == {"page": str(out), "events": [saved]}
    assert out.is_file() and not (tmp_path / "report.html").exists()


def test_events(tmp_path: Path) -> None:
    write(tmp_path, range(10, 60, 10))
    write(tmp_path, range(40, 60, 10))  # continued from a checkpoint of step 30
    (tmp_path / "step-00000030").mkdir()
    found = find_events(parse_records(tmp_path / "metrics.jsonl"), tmp_path)
    kinds = [(event.step, event.kind) for event in found]
    write_skips(tmp_path / "metrics.jsonl")
    assert cli.main(["report", str(tmp_path)]) == 0
    told = find_events(parse_records(tmp_path / "metrics.jsonl"), tmp_path)[4:]
    assert [(event.step, event.kind) for event in told] == [
        (51, "repair"),
        (53, "spike"),
        (60, "skip"),
    ]
    assert told[0].what == "step skipped: copies differed" and told[2].what.startswith("2 steps")
    assert kinds == [(30, "checkpoint"), (30, "loss"), (30, "skip"), (40, "restart")]


@pytest.mark.parametrize("content", [None, "", "not a record\n", "[1]\n"])
def test_no_records_are_one_sentence(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "has no records to report" in said and said.count("\n") == 1
    assert cli.main(["report", str(tmp_path / "missing")]) == 2


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, range(10, 30, 10))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "belief-dist[report]" in capsys.readouterr().err
