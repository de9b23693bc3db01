"""The processes of one engine: they build it, train, report and end."""

from __future__ import annotations

import datetime
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks import network
from benchmarks.engines import BUILDERS, import_package
from benchmarks.local_ranks import threads_of
from examples.gpt.model import GPT, VOCABULARY

_TIMEOUT = datetime.timedelta(minutes=3)
_HEAD_WIDTH = 64
_WARM_UP = 2  # steps
_LOOK_SECONDS = 0.005


@dataclass(frozen=True)
class Workload:
    """What every engine trains."""

    ranks: int
    steps: int  # that count, in every turn
    layers: int
    width: int
    batch: int  # sequences per rank
    context: int
    dtype: str  # "float32" or "bfloat16"

    @property
    def threads(self) -> int:
        """Threads of each rank: its share of the cores."""
        return threads_of(self.ranks)

    def tokens(self, rank: int) -> Tensor:
        """Return the batch of a rank, (batch, context + 1)."""
        generator = torch.Generator().manual_seed(rank)
        return torch.randint(VOCABULARY, (self.batch, self.context + 1), generator=generator)

    def model(self) -> GPT:
        """Return the model, equal on all ranks and float32."""
        torch.manual_seed(0)
        return GPT(self.layers, self.width, max(1, self.width // _HEAD_WIDTH), self.context)


@dataclass
class Turn:
    """What the first rank measured."""

    seconds: list[float]  # of every step that counts
    phases: dict[str, list[float]]  # parts of these, by name
    peak_mib: float  # memory beyond that of a process without a model
    sent: int | None  # bytes that left its interface per step, headers included


def take_turn(name: str, work: Workload, namespaces: Sequence[str | None]) -> Turn:
    """Train with an engine in new processes, one for each of `namespaces`.

    Every turn has processes of its own, so that no engine works in memory that another has left
    behind, and only one engine's memory is in use at a time.

    Raises:
        RuntimeError: A rank fails; its traceback is on stderr.
    """
    os.environ["OMP_NUM_THREADS"] = str(work.threads)  # read when a rank imports torch
    context = mp.get_context("spawn")
    links, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank, namespace in enumerate(namespaces):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, name, work, f"file://{folder}/store", namespace, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()  # so that the end of the process is the end of the connection
            links.append(ours)
            processes.append(process)
        try:
            reports = [link.recv() for link in links]
        except EOFError as error:
            for process in processes:
                process.terminate()
            raise RuntimeError(f"a rank of {name!r} has failed, see above") from error
        for process in processes:
            process.join()
    turn: Turn = reports[0]
    return turn


def _rank_main(
    rank: int,
    name: str,
    work: Workload,
    store: str,
    namespace: str | None,
    link: Connection,
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(work.threads)
    if namespace is not None:
        network.enter(namespace)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": work.ranks}
    os.environ.update({key: str(value) for key, value in ranks.items()})  # DeepSpeed asks for them
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=work.ranks, timeout=_TIMEOUT
    )
    import_package(name)
    before = _memory_mib()
    tokens = work.tokens(rank)
    model = work.model()
    train = BUILDERS[name](model, getattr(torch, work.dtype))
    for _ in range(_WARM_UP):  # allocates what the engine keeps
        list(train(tokens))
    dist.barrier()
    seconds: list[float] = []
    phases: dict[str, list[float]] = {}
    sent = None if namespace is None else network.bytes_sent()
    for _ in range(work.steps):
        start = last = time.perf_counter()
        for phase in train(tokens):
            now = time.perf_counter()
            phases.setdefault(phase, []).append(now - last)
            last = now
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    if sent is not None:
        sent = (network.bytes_sent() - sent) // work.steps
    # In steps of their own: looking takes time.
    with _PeakMemory() as memory:
        for _ in range(_WARM_UP):
            list(train(tokens))
        model.state_dict()  # reads all parameters: nothing stays under way
        dist.barrier()
    link.send(Turn(seconds, phases, memory.peak_mib - before, sent))
    dist.barrier()
    dist.destroy_process_group()


class _PeakMemory:
    """Looks at the memory of this process all the time, in a thread."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ends.wait(_LOOK_SECONDS):
            self.peak_mib = max(self.peak_mib, _memory_mib())


def _memory_mib() -> float:
    """Return this process's memory; of a page that several map, each counts its part."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/smaps_rollup tells no Pss")
