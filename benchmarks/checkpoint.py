"""Times checkpoints of a model with float32 states, next to FSDP2 with DCP, and DeepSpeed."""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

_WIDTH = 2048
Row = dict[str, float]


class Sums(nn.Module):
    """A model whose forward and backward are nothing: its parameters count."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        count = max(1, round(millions * 1e6 / _WIDTH**2))
        torch.manual_seed(0)
        self.layers = nn.ParameterList(
            [nn.Parameter(torch.randn(_WIDTH, _WIDTH)) for _ in range(count)]
        )

    def forward(self) -> Tensor:
        return torch.stack([(layer * layer).mean() for layer in self.layers]).sum()


def _rss(peak: bool) -> float:
    key = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(key)]
    return int(line.split()[1]) / 1024


def _measured(action: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return (seconds, MiB beyond what was there before, the result); all ranks together."""
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begin = _rss(False), time.perf_counter()
    result = action()
    dist.barrier()
    return time.perf_counter() - begin, _rss(True) - before, result


def _disk(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _ours(millions: int, folder: Path) -> dict[str, Row]:
    from belief_dist import ShardedAdaBelief, checkpoint

    def build() -> tuple[nn.Module, ShardedAdaBelief]:
        model = Sums(millions)
        return model, ShardedAdaBelief(model.named_parameters(), stage=2)

    model, optimizer = build()
    model().backward()
    optimizer.step()
    optimizer.zero_grad()
    parts = {"model": model, "optimizer": optimizer}
    seconds, extra, _ = _measured(lambda: checkpoint.save(folder / "a", 1, **parts))
    row = {"blocked": seconds, "total": seconds, "save MiB": extra}
    row["bytes"] = _disk(folder / "a")
    row["load"], row["load MiB"], _ = _measured(lambda: checkpoint.load(folder / "a", **parts))
    row["load, unverified"], _, _ = _measured(
        lambda: checkpoint.load(folder / "a", **parts, verify=False)
    )
    found = {"belief_dist": row}
    shutil.rmtree(folder / "a", ignore_errors=True)
    dist.barrier()
    with checkpoint.BackgroundSaver(folder / "b", **parts, keep=1) as saver:
        for number, name in enumerate(("first", "later")):
            blocked, extra, _ = _measured(lambda n=number: saver.save(n))
            saved = saver.wait()
            assert saved is not None
            found[f"belief_dist, background, {name}"] = {
                "blocked": blocked,
                "total": saved.seconds,
                "save MiB": extra,
                "bytes": _disk(folder / "b"),
            }
    return found


def _fsdp(millions: int, folder: Path) -> dict[str, Row]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    model: Any = Sums(millions)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model().backward()
    optimizer.step()
    optimizer.zero_grad()

    def state() -> dict[str, Any]:
        weights, states = get_state_dict(model, optimizer)
        return {"model": weights, "optim": states}

    def load() -> None:
        read = state()
        dcp.load(read, checkpoint_id=folder / "a")
        set_state_dict(
            model, optimizer, model_state_dict=read["model"], optim_state_dict=read["optim"]
        )

    seconds, extra, _ = _measured(lambda: dcp.save(state(), checkpoint_id=folder / "a"))
    row = {"blocked": seconds, "total": seconds, "save MiB": extra, "bytes": _disk(folder / "a")}
    row["load"], row["load MiB"], _ = _measured(load)
    found = {"FSDP2 + DCP": row}
    for number, name in enumerate(("first", "later")):
        begin = time.perf_counter()
        path = folder / f"b{number}"
        blocked, extra, future = _measured(lambda p=path: dcp.async_save(state(), checkpoint_id=p))
        future.result()
        dist.barrier()
        found[f"FSDP2 + DCP async_save, {name}"] = {
            "blocked": blocked,
            "total": time.perf_counter() - begin,
            "save MiB": extra,
            "bytes": _disk(path),
        }
        dist.barrier()
        shutil.rmtree(path, ignore_errors=True)
    return found


def _deepspeed(millions: int, folder: Path) -> dict[str, Row]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model = Sums(millions)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdaBelief"},
            "zero_optimization": {"stage": 2},
        },
    )
    engine.backward(engine())
    engine.step()
    seconds, extra, _ = _measured(lambda: engine.save_checkpoint(str(folder), tag="a"))
    row = {"blocked": seconds, "total": seconds, "save MiB": extra, "bytes": _disk(folder)}
    row["load"], row["load MiB"], _ = _measured(lambda: engine.load_checkpoint(str(folder), "a"))
    return {"DeepSpeed ZeRO-2": row}


_CONTENDERS = {"belief_dist": _ours, "FSDP2": _fsdp, "DeepSpeed": _deepspeed}


def _main(rank: int, ranks: int, name: str, millions: int, folder: str) -> None:
    warnings.filterwarnings("ignore")
    threads = max(1, (os.cpu_count() or 1) // ranks)
    torch.set_num_threads(threads)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(folder, "extensions"))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(minutes=10),
    )
    run = Path(folder, "run")
    run.mkdir(exist_ok=True)
    dist.barrier()
    found = _CONTENDERS[name](millions, run)
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an orderly end


def run_checkpoint(
    millions: int, ranks: int, only: list[str] | None, folder: Path | None
) -> dict[str, Row]:
    """Return, for every contender, seconds, bytes and MiB of the first rank.

    Args:
        millions: Parameters.
        ranks: Processes.
        only: Some of the contenders: belief_dist, FSDP2, DeepSpeed.
        folder: Where to write; None for the system's temporary folder.
    """
    found: dict[str, Row] = {}
    for name in only or _CONTENDERS:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            mp.spawn(_main, (ranks, name, millions, scratch), nprocs=ranks)
            found |= torch.load(Path(scratch, "found.pt"))
    return found
