"""What the simulation says: next to what was measured here, and at sizes that nobody has here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from belief_dist.sharding.layout import Layout, plan_layout
from benchmarks.engines import OURS
from benchmarks.record import record, record_profile, specs_of
from benchmarks.simulation import Device, Network, Prediction, Profile, lower_bound, predict
from benchmarks.step import namespaces
from benchmarks.team import Workload, take_turn
from examples.gpt.model import GPT

# Of an Ethernet frame of 1,514 bytes, what TCP carries.
_PAYLOAD = 1448 / 1514
_MIB = 1 << 20
# Engines of the step benchmark that the simulation describes: bucket_bytes, overlap.
_VARIANTS: dict[str, tuple[int, bool]] = {
    f"{OURS} ZeRO-1": (32 * _MIB, True),
    f"{OURS} ZeRO-1, 4 MiB buckets": (4 * _MIB, True),
    f"{OURS} ZeRO-1, no overlap": (32 * _MIB, False),
}


@dataclass
class Comparison:
    """A step as predicted and as measured, in seconds."""

    ranks: int
    gbit: float
    engine: str
    predicted: float
    measured: float
    exposed: float  # measured, beyond forward and backward of the profile
    bound: float  # what no schedule avoids of it


def compare(work: Workload, gbit: float, rounds: int) -> list[Comparison]:
    """Measure steps behind a link of `gbit` Gbit/s, and predict them from a profile taken there."""
    measured: dict[str, list[float]] = {name: [] for name in _VARIANTS}
    with namespaces(work.ranks, gbit) as places:
        profile, device, latency = record(work, places)
        for _ in range(rounds):
            for name, seconds in measured.items():
                seconds.extend(take_turn(name, work, places).seconds)
    link = Network(latency, gbit * 1e9 / 8 * _PAYLOAD)
    found = []
    for name, (bucket_bytes, overlap) in _VARIANTS.items():
        layout = plan_layout(specs_of(work.model(), work.dtype), work.ranks, bucket_bytes)
        foreseen = predict(layout, profile, link, device, overlap=overlap)
        seconds = median(measured[name])
        bound = lower_bound(layout, profile, link)
        exposed = seconds - foreseen.compute
        found.append(Comparison(work.ranks, gbit, name, foreseen.total, seconds, exposed, bound))
    return found


def comparison_table(found: list[Comparison]) -> Table:
    """Return all comparisons as a table."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("ranks", "Gbit/s", "engine"):
        table.add_column(heading, no_wrap=True)
    for heading in ("predicted\nms", "measured\nms", "predicted /\nmeasured", "exposed\nms"):
        table.add_column(heading, justify="right")
    table.add_column("exposed /\nlower bound", justify="right")
    for each in found:
        table.add_row(
            str(each.ranks),
            f"{each.gbit:g}",
            each.engine,
            f"{each.predicted * 1e3:.0f}",
            f"{each.measured * 1e3:.0f}",
            f"{each.predicted / each.measured:.2f}",
            f"{each.exposed * 1e3:.0f}",
            f"{each.exposed / each.bound:.2f}" if each.bound else "-",
        )
    return table


@dataclass(frozen=True)
class Cluster:
    """Devices that nobody has here, by their data sheets."""

    gbit: float = 400.0  # of each device's link
    latency: float = 2e-6  # seconds per message
    tflops: float = 400.0  # that a device really reaches
    memory: float = 3e12  # bytes per second

    def network(self) -> Network:
        return Network(self.latency, self.gbit * 1e9 / 8)

    def device(self) -> Device:
        # An update reads and writes master, m and s, reads a gradient and writes a parameter.
        return Device(self.memory, self.memory / (2 * 12 + 4 + 2), self.memory)


@dataclass
class Plan:
    """A layout at scale and its step."""

    ranks: int
    rows: int
    bucket_mib: int
    buckets: int
    padding: float  # part of all elements
    seconds: float  # that planning took
    step: Prediction


def plan_at_scale(
    layers: int,
    width: int,
    ranks: int,
    rows: int,
    bucket_mib: int,
    tokens: int,
    cluster: Cluster,
) -> Plan:
    """Plan a bfloat16 GPT on `rows` times `ranks / rows` devices and predict its step."""
    with torch.device("meta"):
        model = GPT(layers, width, width // 128, context=2048)
    specs = specs_of(model, "bfloat16")
    count = sum(spec.numel for spec in specs)
    start = time.perf_counter()
    layout: Layout = plan_layout(specs, ranks // rows, bucket_mib * _MIB, num_replicas=rows)
    seconds = time.perf_counter() - start
    # The course of a real backward, layer by layer, at the speed of such a device.
    forward = 2 * count * tokens / (cluster.tflops * 1e12)
    profile = _small_profile(layers).scaled(forward, 2 * forward)
    step = predict(layout, profile, cluster.network(), cluster.device(), rows=rows)
    padded = sum(bucket.numel for bucket in layout.buckets)
    return Plan(ranks, rows, bucket_mib, len(layout.buckets), padded / count - 1, seconds, step)


@cache
def _small_profile(layers: int) -> Profile:
    """Record a narrow model of as many layers; its tensors correspond to those of the wide one."""
    return record_profile(Workload(1, 1, layers, 64, 1, 64, "float32"))


def scale_table(plans: list[Plan]) -> Table:
    """Return all plans as a table."""
    table = Table(box=SIMPLE_HEAD)
    for heading in (
        "ranks",
        "rows",
        "bucket\nMiB",
        "buckets",
        "padding\n%",
        "planned in\nms",
        "compute\ns",
        "exposed\ns",
        "step\ns",
    ):
        table.add_column(heading, justify="right")
    for plan in plans:
        table.add_row(
            f"{plan.ranks:,}",
            str(plan.rows),
            str(plan.bucket_mib),
            str(plan.buckets),
            f"{100 * plan.padding:.3f}",
            f"{plan.seconds * 1e3:.0f}",
            f"{plan.step.compute:.2f}",
            f"{plan.step.exposed:.2f}",
            f"{plan.step.total:.2f}",
        )
    return table


def best(plans: list[Plan]) -> Plan:
    """Return the plan with the shortest step; of equals, that with the smallest buckets."""
    return min(plans, key=lambda plan: (round(plan.step.total, 3), plan.bucket_mib))
