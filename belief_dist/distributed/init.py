"""`init()`: initialize torch.distributed from the environment that a launcher has set up."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from belief_dist.distributed import handshake
from belief_dist.distributed.errors import LaunchError
from belief_dist.distributed.network import address_towards, interface_of, is_loopback
from belief_dist.distributed.rank_info import ALONE, RankInfo, read_rank_info
from belief_dist.distributed.store import open_store

TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class World:
    """The rank, device and backend of this process.

    Attributes:
        rank: In 0..world_size-1.
        world_size: Number of processes.
        local_rank: Index among the processes on this host.
        device: Where this rank trains: "cpu", or the accelerator with index `local_rank`.
        backend: Backend of torch.distributed: "gloo", "nccl", ...
        launcher: What started the process, for messages.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    launcher: str


# How long the interpreter waits at its end for threads of gloo; they need microseconds.
_END_SECONDS = 0.05

_world: World | None = None
_exported: dict[str, str] = {}
_count = 0  # calls that joined a group; each uses store keys of its own


def init(*, backend: str | None = None, timeout: timedelta = TIMEOUT) -> World:
    """Initialize torch.distributed under any launcher, and find this process's device.

    Understands torchrun, the deepspeed launcher, mpirun (Open MPI, MPICH, Intel MPI), srun,
    variables set by hand, and a single process without a launcher. MASTER_ADDR and MASTER_PORT are
    used where they are set; mpirun and srun do not need them. Afterwards RANK, WORLD_SIZE,
    LOCAL_RANK, MASTER_ADDR and MASTER_PORT are in the environment for other libraries, and
    GLOO_SOCKET_IFNAME, unless it was set before, names the interface that leads to the other hosts.

    All ranks must call it. Further calls return the same World. If torch.distributed is initialized
    already (by `deepspeed.init_distributed`, say), its default group is used.

    Args:
        backend: Backend of torch.distributed; None means the device's default: "nccl" on CUDA,
            "gloo" on CPUs.
        timeout: How long to wait for a rank to join, and in a collective, before that is an error.
            Torch's own default for gloo is 30 minutes.

    Raises:
        LaunchError: The environment does not determine this process's rank; rank 0 cannot be
            found; or ranks differ in code, versions, world size or backend.
    """
    global _world, _count
    if timeout <= timedelta(0):
        raise ValueError(f"timeout must be positive, got {timeout}.")
    initialized = dist.is_initialized()
    if initialized and _world is not None:
        return _world
    # Without what an earlier call exported: that would look like another launcher's variables.
    environ = {k: v for k, v in os.environ.items() if _exported.get(k) != v}
    info = read_rank_info(environ)
    _count += 1
    if initialized:
        _world = _join_existing(info, timeout)
    else:
        _world = _join_new(info, environ, backend, timeout)
    if "gloo" in _world.backend:
        atexit.unregister(_let_gloo_finish)  # of an earlier call
        atexit.register(_let_gloo_finish)
    return _world


def _let_gloo_finish() -> None:
    """Give gloo's threads the interpreter's lock before the interpreter ends.

    A thread of gloo lets go of a collective's tensors after those who waited for it have gone on,
    and takes the lock to do so. If the interpreter ends first, such a thread aborts the process
    ("terminate called without an active exception"), after everything was done right.
    `destroy_process_group` does not wait for it.
    """
    time.sleep(_END_SECONDS)


def _join_new(
    info: RankInfo, environ: Mapping[str, str], backend: str | None, timeout: timedelta
) -> World:
    with ExitStack() as stack:
        store, address, port = open_store(info, environ, timeout, stack)
        # A prefix for each call: after destroy_process_group the store may hold keys of the last.
        ours = PrefixStore(f"belief_dist/{_count}", store)
        local_rank = info.local_rank
        if local_rank is None:
            local_rank = handshake.count_local_rank(ours, info.rank)
        world, hosts = _compare_ranks(ours, info, local_rank, backend, timeout)
        if not os.environ.get("GLOO_SOCKET_IFNAME"):
            interface = _interface(ours, info, address)
            if interface is not None:
                _export(GLOO_SOCKET_IFNAME=interface)
        dist.init_process_group(
            world.backend,
            store=PrefixStore(f"default_pg/{_count}", store),
            rank=info.rank,
            world_size=info.world_size,
            timeout=timeout,
        )
    _export(
        RANK=info.rank,
        WORLD_SIZE=info.world_size,
        LOCAL_RANK=local_rank,
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )
    if info.local_world_size is not None:
        _export(LOCAL_WORLD_SIZE=info.local_world_size)
    if world.rank == 0:
        _announce(
            world, hosts, f"rank 0 at {address}:{port}, timeout {timeout.total_seconds():g} s"
        )
    return world


def _join_existing(info: RankInfo, timeout: timedelta) -> World:
    """Use the default group that has been initialized elsewhere."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if info.world_size == size and info.rank != rank:
        raise LaunchError(
            f"torch.distributed was initialized as rank {rank} of {size}, but the environment says "
            f"{info}: initialize it once, by belief_dist.distributed.init()."
        )
    store = dist.distributed_c10d._get_default_store()
    ours = PrefixStore(f"belief_dist/{_count}", store)
    launcher, local_rank = info.launcher, info.local_rank
    if info.world_size != size:  # initialized from a file store, say
        launcher, local_rank = "an initialized torch.distributed", None
    if local_rank is None:
        local_rank = handshake.count_local_rank(ours, rank)
    joined = RankInfo(launcher, rank, size, local_rank, info.local_world_size, info.names)
    world, hosts = _compare_ranks(ours, joined, local_rank, str(dist.get_backend()), timeout)
    if rank == 0:
        _announce(world, hosts, "initialized before")
    return world


def _compare_ranks(
    store: Store, info: RankInfo, local_rank: int, backend: str | None, timeout: timedelta
) -> tuple[World, list[str]]:
    """Find the device, and compare all ranks; a problem on one raises on all."""
    problem = ""
    device = torch.device("cpu")
    try:
        device = _device(local_rank, info.names[2])
        _check_interface()
    except LaunchError as error:
        problem = str(error)
    backend = backend or dist.get_default_backend_for_device(device)
    world = World(info.rank, info.world_size, local_rank, device, backend, info.launcher)
    facts = handshake.own_facts(world.world_size, backend)
    hosts = handshake.compare_ranks(
        store,
        world.rank,
        world.world_size,
        facts,
        problem,
        timeout=timeout,
        warn=local_rank == 0,
    )
    return world, hosts


def _device(local_rank: int, name: str) -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    count, index = torch.accelerator.device_count(), local_rank
    visible = [v for v in _VISIBLE if v in os.environ]
    if count == 1 and visible:
        index = 0  # the launcher shows each rank its own device only
    elif local_rank >= count:
        raise LaunchError(
            f"{name} is {local_rank}, but {socket.gethostname()} has {count} devices"
            f"{''.join(f' ({v}={os.environ[v]})' for v in visible)}: start at most {count} "
            f"processes on it."
        )
    torch.accelerator.set_device_index(index)
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, index)


_VISIBLE = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)


def _check_interface() -> None:
    known = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in known:
            raise LaunchError(
                f"GLOO_SOCKET_IFNAME is {name!r}, but the interfaces of {socket.gethostname()} are "
                f"{', '.join(known)}: name one of them, or unset it."
            )


def _interface(store: Store, info: RankInfo, master: str) -> str | None:
    """Return the interface that leads to the other ranks, or None if it is not known.

    By default gloo resolves this host's own name instead, which many hosts map to 127.0.1.1.
    """
    try:
        own = address_towards(master)
        store.set(f"address/{info.rank}", own)
        if is_loopback(own):  # on rank 0's host: take the route to another host, if there is one
            everyone = store.multi_get([f"address/{rank}" for rank in range(info.world_size)])
            others = [a for a in map(bytes.decode, everyone) if a and not is_loopback(a)]
            own = address_towards(others[0]) if others else own
        return interface_of(own)
    except OSError:
        store.set(f"address/{info.rank}", "")
        return None


def _export(**variables: object) -> None:
    for name, value in variables.items():
        if os.environ.get(name) != str(value):
            os.environ[name] = _exported[name] = str(value)


def _announce(world: World, hosts: list[str], more: str) -> None:
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    on = f" on {interface}" if interface and "gloo" in world.backend else ""
    size, num_hosts = world.world_size, len(set(hosts))
    threads = torch.get_num_threads()
    by = (
        "without a launcher"
        if world.launcher == ALONE.launcher
        else f"launched by {world.launcher}"
    )
    print(
        f"belief_dist: {size} rank{'s' * (size > 1)} on {num_hosts} host{'s' * (num_hosts > 1)}, "
        f"{by}; {world.device.type}, {world.backend}{on}, "
        f"{threads} thread{'s' * (threads > 1)} each; {more}",
        file=sys.stderr,
        flush=True,
    )
