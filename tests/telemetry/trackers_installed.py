"""Trackers of experiments get the numbers of StepMonitor, offline.

test_trackers.py runs this in processes that have them: neither is in the extra `dev`, as wandb is
62 MB and brings 15 packages, and mlflow-skinny is 40 MB, brings 25, and needs another
importlib_metadata than ours.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from belief_dist import ShardedAdaBelief
from belief_dist.telemetry import StepMonitor
from tests.telemetry.test_monitor import one_step


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail if anything is sent: all ways out lead to a door where we stand."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(0.2)
        address = f"http://127.0.0.1:{door.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "WANDB_BASE_URL"):
            monkeypatch.setenv(name, address)
            monkeypatch.setenv(name.lower(), address)
        for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
            monkeypatch.setenv(name, "true")
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        yield
        with pytest.raises(TimeoutError):
            door.accept()


def test_wandb_writes_a_run_offline(tmp_path: Path) -> None:
    import wandb

    with wandb.init(mode="offline", project="belief", dir=tmp_path) as run:
        monitor = StepMonitor(one_step(), run)
        records = {step: monitor.log(step, loss=2.0 / step, note="text") for step in (10, 20)}
    (path,) = tmp_path.rglob("run-*.wandb")
    told = {int(row["_step"]): row for row in history(path)}
    assert told.keys() == records.keys()
    for step, record in records.items():
        assert record is not None and record["note"] == "text"
        assert {key: told[step][key] for key in record} == pytest.approx(record)


def messages(content: bytes) -> Iterator[bytes]:
    """Give the messages in the file of a run, whose form is that of LevelDB's logs.

    After 7 bytes of its own: blocks of 32 KiB, of parts with a checksum (4 bytes), a length (2) and
    a kind (1: whole, 2: first, 3: middle, 4: last). No part begins in the last 6 bytes of a block.
    """
    block, header = 1 << 15, struct.Struct("<IHB")
    position, message = 7, b""
    while position + header.size <= len(content):
        left = block - position % block
        if left < header.size:
            position += left
            continue
        _, length, kind = header.unpack_from(content, position)
        position += header.size
        message += content[position : position + length]
        position += length
        if kind in (1, 4):
            yield message
            message = b""


def history(path: Path) -> list[dict[str, Any]]:
    """Return the records in the file of a run, by wandb's own description of its messages."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for message in messages(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(message)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            names = [item.key or "/".join(item.nested_key) for item in items]
            values = [json.loads(item.value_json) for item in items]
            rows.append(dict(zip(names, values, strict=True)))
    return rows


def test_mlflow_keeps_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        param = torch.nn.Parameter(torch.ones(8))
        optimizer = ShardedAdaBelief([param])  # which has more to tell
        monitor = StepMonitor(optimizer, mlflow)
        records = {}
        for step in (10, 20):
            param.sum().backward()
            optimizer.step()
            records[step] = monitor.log(step, loss=2.0 / step, note="text")
    client = mlflow.MlflowClient()
    for key in ("loss", "belief/signal_p50/group0", "time/step/update", "time/optimizer_step"):
        told = {each.step: each.value for each in client.get_metric_history(run.info.run_id, key)}
        assert told == {step: (record or {})[key] for step, record in records.items()}
    names = client.get_run(run.info.run_id).data.metrics.keys()
    assert names == {key for key, value in (records[20] or {}).items() if key != "note"}
