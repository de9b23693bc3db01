"""The backend "mpi4py" beside gloo: bandwidth, overlap with computing, whole training steps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.evidence import Sheet
from benchmarks.jobs import run_job
from benchmarks.mpi_launch import Launcher, find_launcher
from benchmarks.step import namespaces
from benchmarks.team import Workload

BACKENDS = ("gloo", "mpi4py")
# The share of the longer tensor that a link carries each way at least, for n ranks: nccl-tests'.
COLLECTIVES = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
}
OVERLAPPED = ("all_to_all", "all_gather")  # what ShardedAdaBelief starts during computing
_SECONDS = 600
# Ranks of one machine behind links of their own must not find the memory that they share.
_OVER_THE_LINK = {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}

Measured = dict[str, list[float]]  # seconds of every call


@dataclass(frozen=True)
class Task:
    """What one job measures."""

    work: Workload
    megabytes: list[int]
    rounds: int
    folder: str
    namespaces: list[str]  # one for each rank, or none

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Return what `json.dumps(asdict(task))` has written."""
        fields = json.loads(text)
        return cls(**{**fields, "work": Workload(**fields["work"])})


def run_mpi(
    works: Sequence[Workload],
    megabytes: list[int],
    rounds: int,
    gbit: float | None,
    variables: Mapping[str, str],
) -> list[Sheet]:
    """Run a job for each number of ranks, and return its tables.

    Args:
        works: What is trained, by how many ranks.
        megabytes: Of the longer tensor of each collective.
        rounds: How often the backends take turns.
        gbit: As for `benchmarks.step.run_step`; MPICH only.
        variables: Added to the environment of all ranks.

    Raises:
        RuntimeError: There is no mpiexec for the MPI that mpi4py loads, or a job fails.
    """
    launcher = find_launcher()
    sheets = []
    for work in works:
        found = _run(launcher, work, megabytes, rounds, gbit, variables)
        settings = {
            "ranks": work.ranks,
            "library": launcher.library,
            "link": "this machine's memory" if gbit is None else f"{gbit:g} Gbit/s",
            **variables,
        }
        sheets.append(bandwidth_sheet(found["bandwidth"], work.ranks, megabytes, settings))
        sheets.append(overlap_sheet(found["overlap"], {**settings, "MB": max(megabytes)}))
        model = {key: value for key, value in asdict(work).items() if key != "ranks"}
        sheets.append(step_sheet(found["step"], {**settings, **model}))
    return sheets


def _run(
    launcher: Launcher,
    work: Workload,
    megabytes: list[int],
    rounds: int,
    gbit: float | None,
    variables: Mapping[str, str],
) -> dict[str, Measured]:
    environment = {**launcher.environment, "OMP_NUM_THREADS": str(work.threads), **variables}
    if gbit is not None:
        environment |= _OVER_THE_LINK
    with tempfile.TemporaryDirectory() as folder, namespaces(work.ranks, gbit) as places:
        names = [place for place in places if place is not None]
        task = Task(work, megabytes, rounds, folder, names)
        job = ["-m", "benchmarks.mpi_ranks", json.dumps(asdict(task))]
        done = run_job(launcher.command(work.ranks, *job), Path.cwd(), environment, _SECONDS)
        if done.returncode != 0:
            raise RuntimeError(f"a job of {work.ranks} ranks has failed:\n{done.stdout}")
        result: dict[str, Measured] = json.loads(Path(folder, "found.json").read_text())
        return result


def bandwidth_sheet(
    found: Measured, ranks: int, megabytes: Sequence[int], settings: dict[str, object]
) -> Sheet:
    """Return medians and what a link carries, in 10^9 bytes per second."""
    rows = []
    for what, share in COLLECTIVES.items():
        for size in megabytes:
            seconds = [median(found[f"{what} {size} {name}"]) for name in BACKENDS]
            row = [f"{what}, {size} MB", *(f"{each * 1e3:.2f}" for each in seconds)]
            row += [f"{share(ranks) * size / 1e3 / each:.2f}" for each in seconds]
            rows.append([*row, f"{seconds[0] / seconds[1]:.2f}"])
    columns = [f"{name} {unit}" for unit in ("ms", "GB/s") for name in BACKENDS]
    return Sheet("Bus bandwidth, medians", settings, [*columns, "times as fast"], rows)


def overlap_sheet(found: Measured, settings: dict[str, object]) -> Sheet:
    """Return what of the shorter of transfer and computing is hidden behind the other."""
    rows = []
    for what in OVERLAPPED:
        for name in BACKENDS:
            kinds = ("transfer", "products", "both")
            times = [median(found[f"{what} {name} {kind}"]) for kind in kinds]
            transfer, products, both = times
            hidden = (transfer + products - both) / min(transfer, products)
            row = [f"{what}, {name}", *(f"{each * 1e3:.1f}" for each in times)]
            rows.append([*row, f"{hidden:.0%}"])
    columns = ["transfer ms", "products ms", "both ms", "hidden"]
    return Sheet("A transfer beside matrix products, medians", settings, columns, rows)


def step_sheet(found: Measured, settings: dict[str, object]) -> Sheet:
    """Return the time of a step."""
    rows = []
    for name in BACKENDS:
        times = (median(found[name]), min(found[name]), median(found[name]) / median(found["gloo"]))
        row = [f"{times[0] * 1e3:.1f}", f"{times[1] * 1e3:.1f}", f"{times[2]:.2f}"]
        rows.append([f"ShardedAdaBelief over {name}", *row, str(len(found[name]))])
    columns = ["median ms", "min ms", "times gloo's", "runs"]
    return Sheet("One training step of a GPT", settings, columns, rows)
