"""Commands that predict steps on other machines, and compare predictions with what is measured."""

from __future__ import annotations

from benchmarks.console import console
from benchmarks.forecast import Cluster, best, compare, comparison_table, plan_at_scale, scale_table
from benchmarks.team import Workload


def simulate(
    ranks: list[int] | None = None,
    links: list[float] | None = None,
    rounds: int = 2,
    steps: int = 4,
    layers: int = 10,
    width: int = 512,
) -> None:
    """Compare predicted with measured steps behind slow links (root only).

    Args:
        ranks: Processes; 2 and 4 by default.
        links: Gbit/s; 1 and 10 by default.
        rounds: How often engines take turns.
        steps: Timed steps in each turn.
        layers: Of the model.
        width: Of the model, a multiple of 64.
    """
    found = []
    for count in ranks or [2, 4]:
        for gbit in links or [1.0, 10.0]:
            work = Workload(count, steps, layers, width, 1, 128, "float32")
            found += compare(work, gbit, rounds)
    out = console()
    out.print(comparison_table(found))


def scale(
    layers: int = 80,
    width: int = 10240,
    ranks: list[int] | None = None,
    rows: list[int] | None = None,
    buckets: list[int] | None = None,
    tokens: int = 8192,
    cluster: Cluster = Cluster(),  # noqa: B008  # it cannot change
) -> None:
    """Plan a model of 100 billion parameters for thousands of ranks, and predict its step.

    Args:
        layers: Of the model.
        width: Of the model, a multiple of 128.
        ranks: Devices; 1,024 and 16,384 by default.
        rows: Copies of all shards (HSDP); 1, and what leaves 1,024 ranks a row, by default.
        buckets: Sizes of a bucket in MiB.
        tokens: That each device trains on in a step.
        cluster: Speeds of devices and links.
    """
    out = console()
    for count in ranks or [1024, 16384]:
        for number in rows or sorted({1, count // 1024}):
            plans = [
                plan_at_scale(layers, width, count, number, mib, tokens, cluster)
                for mib in buckets or [32, 512, 2048, 8192]
            ]
            out.print(scale_table(plans))
            out.print(f"Shortest with buckets of {best(plans).bucket_mib} MiB.")
