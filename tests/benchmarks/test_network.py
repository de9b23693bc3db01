"""What leaves a rank's interface is what the formulas say, and little more."""

from __future__ import annotations

import multiprocessing
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from belief_dist import ShardedAdaBelief
from benchmarks import network

needs_namespaces = pytest.mark.skipif(
    network.missing_tools() is not None, reason=str(network.missing_tools())
)


def rank_main(rank: int, namespace: str, store: str, link: Connection) -> None:
    network.enter(namespace)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    report = []
    for stage, wire in ((1, None), (2, None), (1, torch.bfloat16), (1, torch.int8)):
        params = [nn.Parameter(torch.zeros(1000, 500)) for _ in range(4)]
        optimizer = ShardedAdaBelief(params, stage=stage, reduce_dtype=wire, bucket_bytes=4 << 20)
        dist.barrier()
        before, start = network.bytes_sent(), time.perf_counter()
        torch.stack([(param * 2).sum() for param in params]).sum().backward()
        optimizer.step()
        for param in params:
            param.sum()  # settles its gather: what this rank sends has left it
        dist.barrier()
        seconds = time.perf_counter() - start
        elements = sum(bucket.numel for bucket in optimizer.layout.buckets)
        per_element = 4 + {None: 4, torch.bfloat16: 2, torch.int8: 260 / 256}[wire]
        formula = elements * per_element * 2 / 3
        report.append((network.bytes_sent() - before, formula, seconds))
    link.send(report)
    dist.barrier()
    dist.destroy_process_group()


@needs_namespaces
@pytest.mark.parametrize("gbit", [None, 1.0])
def test_interface_counters_agree_with_the_formula(gbit: float | None, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with network.Network(3, gbit) as made:
        names = [made.namespace(rank) for rank in range(3)]
        links = []
        processes = []
        for rank, name in enumerate(names):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=rank_main, args=(rank, name, str(tmp_path / "store"), theirs)
            )
            process.start()
            links.append(ours)
            processes.append(process)
        reports = [link.recv() if link.poll(60) else None for link in links]
        for process in processes:
            process.join(30)
    assert all(reports), "a rank failed, see above"
    for report in reports:
        for sent, formula, seconds in report:
            # Headers are 66 of 1,514 bytes; acknowledgements of what arrives add as much again at
            # most, and the message, the barriers and gloo's own headers a few ten thousand bytes.
            assert formula < sent < formula * 1.09 + 100_000
            # A link is no faster than it should be, but for the burst that it lets through.
            if gbit is not None:
                assert seconds > 0.9 * (formula - 600_000) * 8 / (gbit * 1e9)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert not any(name in left.stdout for name in names)


@needs_namespaces
def test_a_failure_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network.Network(2, gbit=0.0)
    with pytest.raises(RuntimeError, match="qdisc add dev eth0 root tbf rate 0"), made:
        pass
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert made.namespace(0) not in left.stdout


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match="of 2 namespaces: network namespaces need root"):
        network.Network(2, gbit=1.0)
