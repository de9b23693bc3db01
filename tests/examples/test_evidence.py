"""The experiments about AdaBelief's claims: all of them for a moment, and what is recorded."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.evidence import __main__ as command
from examples.evidence.adversarial import frechet
from examples.evidence.catalog import STUDIES
from examples.evidence.direction import LEVELS
from examples.evidence.eadam import EAdam
from examples.evidence.estimates import compare, interval
from examples.evidence.findings import Findings, load
from examples.evidence.packages import file_of
from examples.evidence.report import draw, text
from examples.evidence.runner import complete
from examples.evidence.store import Store
from examples.evidence.study import TUNING_SEED, Cell, Contender, Points, Run, Study
from examples.evidence.tables import regions, trace
from examples.evidence.toys import CASES, Case
from tests.harness.paths import ROOT

# An independent simulation in numpy: the first step within 0.15 of the minimum, or None for what
# the videos show at their end.
SIMULATED: dict[str, tuple[int, int | None]] = {
    "valley, near an edge": (80, 236),
    "valley, on a diagonal": (81, 240),
    "flat valley, from above": (55, 136),
    "flat valley, near an edge": (80, 236),
    "turned valley": (1101, 1321),
    "turned bowl": (432, None),
    "log Beale, right": (229, None),
    "log Beale, left": (184, None),
    "Rosenbrock, right": (155, 423),
    "Rosenbrock, left": (1358, None),
    "McCormick, above": (312, None),
    "McCormick, right": (161, None),
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Findings]:
    return load(command.RESULTS)


def test_every_experiment_runs_and_is_reported(tmp_path: Path) -> None:
    """In one process of its own, which may start ranks; the second time nothing is left to do."""
    arguments = [sys.executable, "-m", "examples.evidence", "--results", str(tmp_path)]
    for _ in range(2):
        done = subprocess.run(
            [*arguments, "run", "all", "--quick"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        files = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
        assert len(files) == len(STUDIES)
    for study in STUDIES.values():
        quick = study.shortened()
        store = Store(tmp_path / f"{study.name}.csv", study.metrics)
        assert len(store) == quick.count
        assert files[f"{study.name}.csv"].count(b"\n") == 1 + sum(map(len, store.values()))


def test_the_report_is_what_the_records_say(recorded: dict[str, Findings], tmp_path: Path) -> None:
    page = (ROOT / "docs" / "evidence.md").read_text()
    assert text(recorded) == page
    draw(recorded, tmp_path)
    for path in tmp_path.iterdir():
        assert f"]({path.name})" in page
        assert (ROOT / "docs" / path.name).exists()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_toys_move_as_simulated(recorded: dict[str, Findings], case: Case) -> None:
    found = recorded["toys"]
    for name, frame in zip(("AdaBelief", "Adam"), SIMULATED[case.name], strict=True):
        points = found.store[next(iter(found.runs(case.name, name).values()))]
        if frame is not None:
            assert points[-1]["near"] == pytest.approx(frame, rel=0.05)
            continue
        at = next(point for point in points if point["step"] >= case.frames)
        assert case.adam.end is not None
        apart = math.dist((at["x"], at["y"]), case.adam.end)
        assert apart <= 0.05 * math.dist(case.start, case.adam.end)


def test_recorded_toys_can_be_had_again(recorded: dict[str, Findings]) -> None:
    found = recorded["toys"]
    for name in ("AdaBelief", "Adam"):
        run = next(iter(found.runs("valley, near an edge", name).values()))
        again = found.study.execute(run)
        for ours, theirs in zip(again, found.store[run], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("spread", ["equal", "unequal"])
def test_updates_point_where_the_formula_says(recorded: dict[str, Findings], spread: str) -> None:
    found = recorded["direction"]
    for level in LEVELS:
        for rule in ("Adam", "AdaBelief"):
            setting = f"{spread}, noise {level:g}"
            # AdaBelief's s remembers the start longer than the noise is large.
            near = 0.02 if rule == "Adam" or level >= 0.03 else 0.15
            for metric in ("gradient", "sign"):
                measured = found.values(setting, rule, metric)
                predicted = found.values(setting, rule, f"predicted_{metric}")
                assert len(measured) == 5
                assert measured == pytest.approx(predicted, abs=near)


def test_the_pages_tables() -> None:
    x, y = trace([1.0] * 5, (0.9, 0.999)), trace([-1.0, 1.0] * 3, (0.9, 0.999))
    assert [step.v for step in (*x, *y)] == pytest.approx([1.0] * 11)
    assert x[-1].s < x[0].s < y[-1].s < 1
    small, narrow, slope = regions()
    assert small.belief > 2 * small.adam and slope.belief > 2 * slope.adam
    assert narrow.belief < 0.1 and narrow.adam < 0.1


def test_eadam_is_adam_but_for_eps() -> None:
    def trained(make: type[torch.optim.Optimizer], **options: object) -> torch.Tensor:
        param = torch.linspace(-1, 1, 8, dtype=torch.float64).requires_grad_()
        optimizer = make([param], lr=0.1, weight_decay=0.1, **options)
        for _ in range(20):
            optimizer.zero_grad()
            (param**4).sum().backward()
            optimizer.step()
        return param.detach()

    adam = trained(torch.optim.Adam, eps=1e-30)
    assert torch.allclose(trained(EAdam, eps=1e-30), adam, rtol=1e-9)
    adamw = trained(torch.optim.AdamW, eps=1e-30)
    assert torch.allclose(trained(EAdam, eps=1e-30, decoupled=True), adamw, rtol=1e-9)
    assert not torch.allclose(trained(EAdam, eps=1e-2), adam, rtol=1e-3)


@dataclass(frozen=True)
class Lots:
    """Work whose result tells what was asked for."""

    held_back: bool = False


def draw_lot(work: Lots, contender: Contender, lr: float, seed: int) -> Points:
    return [{"step": 1, "score": math.nan if lr > 1 else lr + 10 * work.held_back + seed / 1e4}]


def lottery(maximize: bool = True) -> Study:
    contenders = (Contender("tuned", "SGD", (0.1, 0.3, 3.0)), Contender("fixed", "SGD", (0.2,)))
    return Study(
        name="lottery",
        question="?",
        train=draw_lot,
        metrics=("score",),
        score="score",
        maximize=maximize,
        minutes=0,
        cells=tuple(Cell("here", each, Lots()) for each in contenders),
        seeds=3,
        tuning={"held_back": True},
    )


@pytest.mark.parametrize(("maximize", "best"), [(True, 0.3), (False, 0.1)])
def test_the_best_learning_rate_is_reported(tmp_path: Path, maximize: bool, best: float) -> None:
    study = lottery(maximize)
    store = Store(tmp_path / "lottery.csv", study.metrics)
    complete(study, store, jobs=1)
    assert len(store) == study.count == 3 + 3 + 3
    assert {run.lr for run in store if not run.tunes and run.contender == "tuned"} == {best}
    tried = store[Run("here", "tuned", 0.1, TUNING_SEED)]
    assert tried[0]["score"] == pytest.approx(10.2)  # on what was held back


def test_a_run_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    study, path = lottery(), tmp_path / "lottery.csv"
    complete(study, Store(path, study.metrics), jobs=1)
    whole = path.read_text()
    path.write_text(whole[:-20])
    store = Store(path, study.metrics)
    assert len(store) == study.count - 1
    complete(study, store, jobs=1)
    again = Store(path, study.metrics)
    assert set(again) == set(store) and len(again) == study.count
    with pytest.raises(ValueError, match="other columns"):
        Store(path, ("loss",))


def test_missing_packages_get_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="apt-get install no-such-package"):
        file_of("no-such-package", "usr/share/none", "A file")


def test_intervals_and_paired_tests() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - 2 == pytest.approx(2 - found.low)
    assert found.high == pytest.approx(2 + 4.3027 / math.sqrt(3), rel=1e-4)  # Student's t, 2
    assert math.isnan(interval([1.0]).low)
    assert compare([1.0, 2.1, 2.9], [2.0, 3.0, 4.0]).found
    assert not compare([1.0, 5.0, 2.9], [2.0, 3.0, 4.0]).found
    assert math.isnan(compare([1.0, 2.0], [1.0, 2.0]).p)


def test_frechet_distance() -> None:
    """Of normal distributions with known moments; those of the samples are near."""
    draw = torch.randn(50_000, 2, generator=torch.Generator().manual_seed(0)).double()
    assert frechet(draw, draw) == pytest.approx(0, abs=1e-9)
    moved = draw * torch.tensor([2.0, 1.0]) + torch.tensor([0.0, 3.0])
    assert frechet(draw, moved) == pytest.approx(9 + 1, rel=0.02)


def test_all_records_are_of_planned_work(recorded: dict[str, Findings]) -> None:
    for name, found in recorded.items():
        planned = set(found.study.runs(found.store))
        assert set(found.store) <= planned, name
        if not found.store:
            continue  # nothing of it has been run
        with (command.RESULTS / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == sum(map(len, found.store.values()))
        assert np.isfinite([float(row["seconds"]) for row in rows if row["seconds"]]).all()
