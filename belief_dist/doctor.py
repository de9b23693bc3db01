"""Looks at an environment and tells what serves here, what is slow or broken, and what to do.

On the ranks of a job it also sums and gathers through the collectives of `ShardedAdaBelief`, and
compares the bits.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from belief_dist import kernels
from belief_dist.distributed import World, init
from belief_dist.distributed.network import is_loopback
from belief_dist.distributed.rank_info import read_rank_info
from belief_dist.kernels.threads import idle_cores, one_thread_sentence, usable_cores
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.trial import Trial

# The oldest DeepSpeed with which everything passes, see docs/deepspeed.md.
_DEEPSPEED = (0, 19, 8)
_PARTNERS = ("transformers", "accelerate", "lightning", "mpi4py", "triton")
_NUMEL = 4 << 20  # of the self-test's buffer, float32
_TURNS = 5


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        topic: What it is about.
        found: What is there.
        advice: What to do; empty if all is well.
    """

    topic: str
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """Look at what this process alone can tell."""
    return [
        Check("Python", platform.python_version()),
        Check("torch", torch.__version__),
        _devices(),
        _threads(),
        *_kernels(),
        _name(),
        _deepspeed(),
        *_partners(),
        *_launchers(),
        _host(),
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Check:
    if not torch.cuda.is_available():
        return Check("devices", "no GPU: everything runs on the processor")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("devices", ", ".join(names))


def _threads() -> Check:
    share = idle_cores(1)
    found = f"{torch.get_num_threads()} threads, {usable_cores()} cores"
    return Check("processor", found, one_thread_sentence(share) if share else "")


def _kernels() -> Iterator[Check]:
    on_gpu = torch.cuda.is_available()
    for name, is_usable, said in kernels.backends():
        if name == "eager":
            continue
        needed = on_gpu if name == "triton" else True
        served = "GPU" if name == "triton" else "processor"
        advice = ""
        if needed and not is_usable:
            repair = "install g++" if name == "cpp" else "install the Triton that torch came with"
            advice = f"updates on the {served} run in plain torch, several times slower: {repair}."
        yield Check(f"kernel for the {served}", said, advice)


def _name() -> Check:
    if hasattr(torch.optim, "AdaBelief"):
        return Check("name in DeepSpeed's JSON", '"AdaBelief" is found without an import')
    return Check(
        "name in DeepSpeed's JSON",
        'torch.optim has no "AdaBelief"',
        "install the package (PYTHONPATH alone has no entry points) and unset "
        "TORCH_DEVICE_BACKEND_AUTOLOAD=0, or write `import belief_dist` in the script.",
    )


def _deepspeed() -> Check:
    version = _version("deepspeed")
    if version is None:
        return Check("DeepSpeed", "not installed")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    wanted = ".".join(map(str, _DEEPSPEED))
    is_old = numbers < _DEEPSPEED
    return Check("DeepSpeed", version, f"take {wanted} or newer: older ones fail in part." * is_old)


def _partners() -> Iterator[Check]:
    for package in _PARTNERS:
        version = _version(package)
        if version is not None:
            yield Check(package, version)


def _launchers() -> Iterator[Check]:
    found = [name for name in ("torchrun", "deepspeed", "mpirun", "srun") if shutil.which(name)]
    yield Check("launchers", ", ".join(found) or "none on PATH")
    if "SLURM_JOB_ID" in os.environ:
        yield Check("Slurm", f"job {os.environ['SLURM_JOB_ID']}")


def _host() -> Check:
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return Check(
            "host name", f"{name} does not resolve", "other hosts need MASTER_ADDR as a number."
        )
    found = f"{name} is {address}"
    if is_loopback(address) and not os.environ.get("GLOO_SOCKET_IFNAME"):
        found += (
            "; with several hosts gloo alone would tell the others so: "
            "belief_dist.distributed.init() tells the right address"
        )
    return Check("host name", found)


def try_collectives(world: World) -> list[Check]:
    """Sum and gather on all ranks, and compare the bits; called by all of them.

    On GPUs also where these read each other's memory, which is not the default.

    Args:
        world: From `distributed.init`.
    """
    found = [_try("collectives", world)]
    if world.device.type == "cuda":
        found.append(_try('collectives, shared_memory="cuda"', world, shared_memory="cuda"))
    return found


def _try(topic: str, world: World, **options: Any) -> Check:
    device = world.device
    params = [torch.nn.Parameter(torch.zeros(8, device=device))]
    comm = ShardedAdaBelief(params, **options).comm
    trial = Trial(comm, _NUMEL // world.world_size // 64 * 64, device)
    seconds = {"sum": 0.0, "gather": 0.0}
    is_exact = True
    for turn in range(_TURNS):
        trial.fill()
        seconds["sum"] += _time(trial.sum)
        is_exact &= trial.is_summed()
        trial.place(turn)
        seconds["gather"] += _time(trial.gather)
        is_exact &= trial.is_gathered(turn)
    everywhere = all(comm.exchange(is_exact))
    sent = _TURNS * trial.flat.nbytes * (world.world_size - 1) / world.world_size / 1e9
    rates = ", ".join(f"{name} {sent / spent:.2f} GB/s" for name, spent in seconds.items())
    found = f"{world.world_size} ranks, {type(comm).__name__}, {world.backend}: {rates} a rank"
    advice = "" if everywhere else "sums or gathers are wrong: the network or memory is faulty."
    return Check(topic, found, advice)


def examine_ranks() -> list[Check]:
    """Examine all ranks of the job that this process belongs to; called by all of them.

    Returns:
        On every rank the same: what the first rank has found, what others have found otherwise, and
        what their collectives do.
    """
    own = examine()
    info = read_rank_info(os.environ)
    if info.world_size == 1 and not dist.is_initialized():
        return own
    world = init()
    everyone: list[list[Check]] = [[] for _ in range(world.world_size)]
    dist.all_gather_object(everyone, own)
    found = list(everyone[0])
    for rank, theirs in enumerate(everyone):
        odd = [each for each in theirs if each not in found]
        found += [each._replace(topic=f"{each.topic}, rank {rank}") for each in odd]
    return found + (try_collectives(world) if world.world_size > 1 else [])


def _time(work: Callable[[], object]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - begin
