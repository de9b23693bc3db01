"""Does what has not been done yet, in as many processes as asked for, and tells the time left."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from examples.evidence.store import Store
from examples.evidence.study import Points, Run, Study


def machine() -> str:
    """Return the processor and the version of torch."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, torch {torch.__version__}"


def timed(study: Study, run: Run) -> tuple[Run, Points, float]:
    """Train with one thread; also return the seconds."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    points = study.execute(run)
    return run, points, time.perf_counter() - start


def complete(study: Study, store: Store, jobs: int) -> None:
    """Run what is missing in the store.

    Args:
        study: The experiment.
        store: Of its finished runs.
        jobs: Processes, each with one thread; 1 stays in this one.
    """
    where = machine()
    with tqdm(total=study.count, initial=len(_wanted(study, store)), desc=study.name) as bar:
        # What is chosen by tuning becomes known when that has ended.
        while missing := [run for run in study.runs(store) if run not in store]:
            for run, points, seconds in _results(study, missing, jobs):
                store.add(run, points, seconds, where)
                bar.set_postfix_str(f"{run.setting}, {run.contender}", refresh=False)
                bar.update()


def _wanted(study: Study, store: Store) -> list[Run]:
    return [run for run in study.runs(store) if run in store]


def _results(study: Study, runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, Points, float]]:
    if jobs == 1:
        yield from (timed(study, run) for run in runs)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting: set[Future[tuple[Run, Points, float]]]
        waiting = {pool.submit(timed, study, run) for run in runs}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
