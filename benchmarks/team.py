"""The processes of one engine: they build it once, then train whenever it is their turn."""

from __future__ import annotations

import datetime
import os
import time
import uuid
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.engines import ENGINES, TrainStep, import_package
from examples.gpt.model import GPT, VOCABULARY

_TIMEOUT = datetime.timedelta(minutes=3)
_HEAD_WIDTH = 64


@dataclass(frozen=True)
class Workload:
    """What every engine trains."""

    ranks: int
    steps: int  # that count, in every turn
    layers: int
    width: int
    batch: int  # sequences per rank
    context: int

    def model(self) -> GPT:
        """Return the model, equal on all ranks."""
        torch.manual_seed(0)
        return GPT(self.layers, self.width, max(1, self.width // _HEAD_WIDTH), self.context)


class Team:
    """Starts the ranks of an engine and gives them their turns.

    Raises:
        RuntimeError: A rank fails; its traceback is on stderr.
    """

    def __init__(self, name: str, work: Workload, threads: int, folder: str) -> None:
        self._name = name
        self._links: list[Connection] = []
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when a rank imports torch
        context = mp.get_context("spawn")
        store = f"file://{folder}/{uuid.uuid4().hex}"
        self._processes = []
        for rank in range(work.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(rank, name, work, threads, store, theirs), daemon=True
            )
            process.start()
            theirs.close()  # so that the end of the process is the end of the connection
            self._links.append(ours)
            self._processes.append(process)
        self._receive()

    def take_turn(self) -> tuple[list[float], float]:
        """Train; return the seconds of every step that counts, and a rank's peak memory in MiB."""
        for link in self._links:
            link.send(True)
        return self._receive()

    def dismiss(self) -> None:
        """End the processes."""
        for link in self._links:
            link.send(False)
        for process in self._processes:
            process.join()

    def _receive(self) -> tuple[list[float], float]:
        """Return what the first rank reports, once all ranks have reported."""
        try:
            reports = [link.recv() for link in self._links]
        except EOFError as error:
            raise RuntimeError(f"a rank of {self._name!r} has failed, see above") from error
        return reports[0]


def _rank_main(
    rank: int, name: str, work: Workload, threads: int, store: str, link: Connection
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": work.ranks}
    os.environ.update({key: str(value) for key, value in ranks.items()})  # DeepSpeed asks for them
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=work.ranks, timeout=_TIMEOUT
    )
    import_package(name)
    before = _memory("VmRSS")
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(VOCABULARY, (work.batch, work.context + 1), generator=generator)
    model = work.model()
    train = ENGINES[name](model)
    train(tokens)  # allocates what the engine keeps
    link.send(None)
    while link.recv():
        seconds = _turn(train, tokens, work.steps)
        model.state_dict()  # reads all parameters: nothing stays under way
        link.send((seconds, _memory("VmHWM") - before))
    dist.barrier()
    dist.destroy_process_group()


def _turn(train: TrainStep, tokens: torch.Tensor, steps: int) -> list[float]:
    train(tokens)  # does not count: caches hold what others have left there
    dist.barrier()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        train(tokens)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return seconds


def _memory(field: str) -> float:
    """Return a field of /proc/self/status in MiB: VmRSS is resident memory, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)
