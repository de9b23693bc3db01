"""Where records go: every kind of sink, ones that fail, and files that are torn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from belief_dist.telemetry import Prometheus, StepMonitor, read_records
from tests.harness.models import HYPER
from tests.telemetry.test_monitor import one_step

pytestmark = pytest.mark.filterwarnings(
    "ignore:eps=.* dominates", "ignore:offload='cpu' updates on 1 thread"
)
TINY = {**HYPER, "eps": 1e-12}


class Writer:
    """As TensorBoard's."""

    def __init__(self) -> None:
        self.told: dict[str, tuple[float, int]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.told[tag] = (scalar_value, global_step)


class Run:
    """As that of Weights & Biases."""

    def __init__(self) -> None:
        self.told: dict[int | None, dict[str, Any]] = {}

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        self.told[step] = data


def test_sinks_of_every_kind(tmp_path: Path) -> None:
    writer, run, called = Writer(), Run(), []
    sinks = [str(tmp_path / "m.jsonl"), writer, run, lambda step, values: called.append(step)]
    monitor = StepMonitor(one_step(), sinks)
    assert monitor.log(9, loss=1.0) is None
    record = monitor.log(10, loss=torch.tensor(2.0), note="text")
    assert record is not None and called == [10] and run.told == {10: record}
    assert writer.told["loss"] == (2.0, 10) and "note" not in writer.told
    assert read_records(tmp_path / "m.jsonl") == [{"step": 10, **record}]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        StepMonitor(one_step(), writer).log(10, loss=2.0)
    found = events.EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "l2_norm/moment/group0"} <= set(found.Tags()["scalars"])
    assert [(each.step, each.value) for each in found.Scalars("loss")] == [(10, 2.0)]


class Metrics:
    """As the module mlflow."""

    def __init__(self) -> None:
        self.told: dict[int | None, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.told[step] = metrics


def test_metrics_and_events_are_numbers(tmp_path: Path) -> None:
    metrics = Metrics()
    StepMonitor(one_step(), metrics).log(10, loss=2.0, note="text")
    assert metrics.told[10]["loss"] == 2.0 and "note" not in metrics.told[10]


@pytest.mark.deepspeed
def test_deepspeeds_monitor_writes_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.monitor import csv_monitor
    from deepspeed.monitor.config import CSVConfig

    monkeypatch.setattr(csv_monitor.dist, "get_rank", lambda: 0)  # no job was started
    config = CSVConfig(enabled=True, output_path=str(tmp_path), job_name="job")
    StepMonitor(one_step(), csv_monitor.csvMonitor(config)).log(10, loss=2.0)
    written = {path.name: path.read_text() for path in tmp_path.rglob("*.csv")}
    assert written["loss.csv"].splitlines() == ["step,loss", "10,2.0"]


def test_prometheus_serves_the_newest_record() -> None:
    sink = Prometheus(port=0)
    monitor = StepMonitor(one_step(), sink)

    def scraped() -> dict[str, float]:
        with urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return {
                f"{each.name} {each.labels['of']}": each.value
                for family in families
                for each in family.samples
            }

    monitor.log(10, loss=2.0, note="text", own=1.0)
    first = scraped()
    assert first["belief_dist_step "] == 10 and first["belief_dist_loss "] == 2.0
    assert first["belief_dist_belief_signal group0"] > 0 and "belief_dist_own " in first
    monitor.log(20, loss=3.0)
    second = scraped()
    assert second["belief_dist_loss "] == 3.0 and "belief_dist_own " not in second
    assert not any("note" in name for name in second)
    sink.close()
    with pytest.raises(OSError):
        scraped()


def test_a_sink_that_fails_does_not_end_training() -> None:
    def fails(step: int, values: dict[str, Any]) -> None:
        raise OSError("no space left")

    called: list[int] = []
    monitor = StepMonitor(one_step(), [fails, lambda step, values: called.append(step)], every=1)
    with pytest.warns(UserWarning, match="sink number 0 of StepMonitor has failed in step 1"):
        monitor.log(1)
    monitor.log(2)
    assert called == [1, 2]


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        ({"every": 0}, ValueError, "every must be 1 or more, got 0"),
        ({"every": True}, TypeError, "every must be a number of steps"),
        ({"sinks": 5}, TypeError, "a sink of StepMonitor is a path"),
        ({"across_ranks": True}, ValueError, "leave it out"),
        ({"optimizer": 1}, TypeError, "got int"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        StepMonitor(**{"optimizer": one_step(), "sinks": [], **arguments})


def test_lines_that_are_torn_or_taken_back(tmp_path: Path) -> None:
    """A killed process leaves half a line; its successor goes on from an older step."""
    path = tmp_path / "metrics.jsonl"
    first = StepMonitor(one_step(), path)
    for step in (10, 20, 30):
        first.log(step, of="first")
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [row["step"] for row in read_records(path)] == [10, 20, 30]
    second = StepMonitor(one_step(), path)
    second.log(20, of="second")
    path.write_bytes(path.read_bytes() + b'[1]\n{"step": "x"}\n\xff\n')
    assert [(row["step"], row["of"]) for row in read_records(path)] == [
        (10, "first"),
        (20, "second"),
    ]
    assert json.loads(path.read_text(errors="replace").splitlines()[0])["step"] == 10
