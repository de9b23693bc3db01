"""`belief-dist doctor`: what it looks at, what it advises, and the ranks of a job."""

from __future__ import annotations

import contextlib
import io
import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from belief_dist import cli, doctor, kernels
from belief_dist.sharding.shared_memory import SharedMemory
from tests.harness.ranks import run_ranks


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json"])
    checks = {each["topic"]: each for each in json.loads(capsys.readouterr().out)}
    assert checks["torch"]["found"] == torch.__version__
    assert checks["kernel for the processor"]["found"].startswith("C++, ")
    assert checks["name in DeepSpeed's JSON"]["advice"] == ""
    assert status == int(any(each["advice"] for each in checks.values()))
    assert cli.main(["doctor"]) == status
    out = capsys.readouterr().out
    assert "kernel for the processor" in out
    assert ("All is well." in out) == (status == 0)


def test_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "backends", lambda: [("cpp", False, "g++ is missing")])
    monkeypatch.setattr(doctor, "idle_cores", lambda ranks: 8)
    monkeypatch.setattr(doctor, "_version", {"deepspeed": "0.18.9"}.get)
    monkeypatch.setattr(torch, "optim", SimpleNamespace())
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("127.0.1.1", 0))])
    checks = doctor.examine()
    advice = {each.topic: each.advice for each in checks if each.advice}
    assert advice.keys() == {
        "processor",
        "kernel for the processor",
        "name in DeepSpeed's JSON",
        "DeepSpeed",
    }
    assert "OMP_NUM_THREADS=8" in advice["processor"]
    assert "install g++" in advice["kernel for the processor"]
    assert "0.19.8 or newer" in advice["DeepSpeed"]
    assert "belief_dist.distributed.init()" in checks[-1].found


def on_ranks() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["doctor", "--json"])
    if dist.get_rank() > 0:
        assert out.getvalue() == ""
        return
    checks = {each["topic"]: each for each in json.loads(out.getvalue())}
    assert checks["collectives"]["advice"] == ""
    assert checks["collectives"]["found"].startswith("3 ranks, SharedMemory, gloo: sum ")


def a_wrong_sum_is_told() -> None:
    start = SharedMemory.start_gather

    def wrong(self: SharedMemory, flat: torch.Tensor) -> object:
        handle = start(self, flat)
        handle.wait()
        if dist.get_rank() == 1:
            flat[0] += 1
        return handle

    SharedMemory.start_gather = wrong  # type: ignore[assignment,method-assign]
    try:
        (check,) = doctor.try_collectives(doctor.init())
    finally:
        SharedMemory.start_gather = start  # type: ignore[method-assign]
    assert "sums or gathers are wrong" in check.advice


def test_the_ranks_of_a_job(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, on_ranks, a_wrong_sum_is_told)
