"""`init()`: from what a launcher left in the environment to an initialized torch.distributed."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from belief_dist.distributed import handshake as peers
from belief_dist.distributed.errors import LaunchError
from belief_dist.distributed.network import address_towards, interface_of, is_loopback
from belief_dist.distributed.rank_info import Place, read_place
from belief_dist.distributed.store import open_store

TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class World:
    """This process among the ranks of its job.

    Attributes:
        rank: In 0..world_size-1.
        world_size: Number of processes.
        local_rank: Among the processes of this host.
        device: Where this rank trains: "cpu", or an accelerator's number `local_rank`.
        backend: Of torch.distributed: "gloo", "nccl", ...
        launcher: What started the process, in words.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    launcher: str


_world: World | None = None
_exported: dict[str, str] = {}
_count = 0  # of joins: each has its own part of the store


def init(*, backend: str | None = None, timeout: timedelta = TIMEOUT) -> World:
    """Initialize torch.distributed under any launcher, and find this process's device.

    Understands torchrun, the deepspeed launcher, mpirun (Open MPI, MPICH, Intel MPI), srun,
    variables set by hand, and a process that is alone. MASTER_ADDR and MASTER_PORT count where they
    are set; mpirun and srun do without. Afterwards RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT are in the environment for other libraries, and GLOO_SOCKET_IFNAME names the
    interface that leads to the other hosts, unless it was set.

    All ranks must call it. Called again it returns the same; if torch.distributed is initialized
    already (by `deepspeed.init_distributed`, say), it joins that group.

    Args:
        backend: Of torch.distributed; None is the device's own: "nccl" on CUDA, "gloo" on CPUs.
        timeout: After which a rank that does not come, or does not answer in a collective, becomes
            an error. Torch's own default for gloo is 30 minutes.

    Raises:
        LaunchError: The environment does not tell one place among the ranks; rank 0 cannot be
            found; or ranks differ in code, versions, world size or backend.
    """
    global _world, _count
    if timeout <= timedelta(0):
        raise ValueError(f"timeout must be positive, got {timeout}.")
    initialized = dist.is_initialized()
    if initialized and _world is not None:
        return _world
    environ = {k: v for k, v in os.environ.items() if _exported.get(k) != v}
    place = read_place(environ)
    _count += 1
    if initialized:
        _world = _adopt(place, timeout)
    else:
        _world = _join(place, environ, backend, timeout)
    return _world


def _join(
    place: Place, environ: Mapping[str, str], backend: str | None, timeout: timedelta
) -> World:
    with ExitStack() as stack:
        store, address, port = open_store(place, environ, timeout, stack)
        ours = PrefixStore(f"belief_dist/{_count}", store)
        local_rank = place.local_rank
        if local_rank is None:
            local_rank = peers.count_local_rank(ours, place.rank)
        world, hosts = _meet(ours, place, local_rank, backend, timeout)
        if not os.environ.get("GLOO_SOCKET_IFNAME"):
            interface = _interface(ours, place, address)
            if interface is not None:
                _export(GLOO_SOCKET_IFNAME=interface)
        dist.init_process_group(
            world.backend,
            store=PrefixStore(f"default_pg/{_count}", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
        )
    _export(
        RANK=place.rank,
        WORLD_SIZE=place.world_size,
        LOCAL_RANK=local_rank,
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )
    if place.local_world_size is not None:
        _export(LOCAL_WORLD_SIZE=place.local_world_size)
    if world.rank == 0:
        _say(world, hosts, f"rank 0 at {address}:{port}, timeout {timeout.total_seconds():g} s")
    return world


def _adopt(place: Place, timeout: timedelta) -> World:
    """Take the place in a group that somebody else has made."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if place.world_size == size and place.rank != rank:
        raise LaunchError(
            f"torch.distributed was initialized as rank {rank} of {size}, but the environment says "
            f"{place}: initialize it once, by belief_dist.distributed.init()."
        )
    store = dist.distributed_c10d._get_default_store()
    ours = PrefixStore(f"belief_dist/{_count}", store)
    launcher, local_rank = place.launcher, place.local_rank
    if place.world_size != size:  # made from a file, say
        launcher, local_rank = "an initialized torch.distributed", None
    if local_rank is None:
        local_rank = peers.count_local_rank(ours, rank)
    joined = Place(launcher, rank, size, local_rank, place.local_world_size, place.names)
    world, hosts = _meet(ours, joined, local_rank, str(dist.get_backend()), timeout)
    if rank == 0:
        _say(world, hosts, "initialized before")
    return world


def _meet(
    store: Store, place: Place, local_rank: int, backend: str | None, timeout: timedelta
) -> tuple[World, list[str]]:
    """Find the device, and compare all ranks; a problem of one is an error on all."""
    problem = ""
    device = torch.device("cpu")
    try:
        device = _device(local_rank, place.names[2])
        _check_interface()
    except LaunchError as error:
        problem = str(error)
    backend = backend or dist.get_default_backend_for_device(device)
    world = World(place.rank, place.world_size, local_rank, device, backend, place.launcher)
    facts = peers.own_facts(world.world_size, backend)
    hosts = peers.meet(
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
        index = 0  # the launcher has chosen one for each rank
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


def _interface(store: Store, place: Place, master: str) -> str | None:
    """Return the interface that leads to the other ranks, or None if it is not known.

    Gloo asks for the address of this host's own name instead, which many hosts map to 127.0.1.1.
    """
    try:
        own = address_towards(master)
        store.set(f"address/{place.rank}", own)
        if is_loopback(own):  # rank 0's host: the way to the others counts, if there are any
            everyone = store.multi_get([f"address/{rank}" for rank in range(place.world_size)])
            others = [a for a in map(bytes.decode, everyone) if a and not is_loopback(a)]
            own = address_towards(others[0]) if others else own
        return interface_of(own)
    except OSError:
        store.set(f"address/{place.rank}", "")
        return None


def _export(**variables: object) -> None:
    for name, value in variables.items():
        if os.environ.get(name) != str(value):
            os.environ[name] = _exported[name] = str(value)


def _say(world: World, hosts: list[str], more: str) -> None:
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    on = f" on {interface}" if interface and "gloo" in world.backend else ""
    size, num_hosts = world.world_size, len(set(hosts))
    print(
        f"belief_dist: {size} rank{'s' * (size > 1)} on {num_hosts} host{'s' * (num_hosts > 1)}, "
        f"launched by {world.launcher}; {world.device.type}, {world.backend}{on}, "
        f"{torch.get_num_threads()} threads each; {more}",
        file=sys.stderr,
        flush=True,
    )
