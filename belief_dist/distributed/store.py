"""Open the store for rendezvous: rank 0 serves it, and all ranks connect."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from belief_dist.distributed import elastic_store, mpi, slurm
from belief_dist.distributed.errors import LaunchError
from belief_dist.distributed.network import (
    address_towards,
    listen_at,
    outward_address,
    wait_for_name,
)
from belief_dist.distributed.rank_info import HYDRA, OPEN_MPI, SLURM, RankInfo

Opened = tuple[Store, str, int]  # the store, and the address and port of its server


def open_store(
    info: RankInfo, environ: Mapping[str, str], timeout: timedelta, stack: ExitStack
) -> Opened:
    """Return the store of a job; called by all ranks.

    Args:
        info: Of this process.
        environ: Its environment; MASTER_ADDR and MASTER_PORT are used where they are set.
        timeout: How long to wait for a rank before its absence is an error.
        stack: Keeps rank 0's answering thread alive until the other ranks have connected.

    Raises:
        LaunchError: Rank 0 cannot be found, or its port is taken.
    """
    master = _master(environ)
    if info.world_size == 1:
        return _serve(info, "127.0.0.1", 0, timeout)
    if info.launcher in (OPEN_MPI, HYDRA):
        return _open_by_mpi(info, master, timeout)
    if info.launcher == SLURM and None in master:
        return _open_by_slurm(info, environ, master, timeout, stack)
    address, port = master
    if address is None or port is None:
        missing = "MASTER_ADDR" if address is None else "MASTER_PORT"
        raise LaunchError(
            f"{missing} is not set, but {info} says that there are other ranks: set MASTER_ADDR "
            f"to rank 0's host and MASTER_PORT to a port that is free there."
        )
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _open_by_agent(info, address, port, timeout, stack)
    return _open_by_variables(info, address, port, timeout)


def _master(environ: Mapping[str, str]) -> tuple[str | None, int | None]:
    text = environ.get("MASTER_PORT")
    if not text:
        return environ.get("MASTER_ADDR") or None, None
    if not (text.isdecimal() and 0 < int(text) < 2**16):
        raise LaunchError(f"MASTER_PORT must be in 1..65535, got {text!r}.")
    return environ.get("MASTER_ADDR") or None, int(text)


def _serve(info: RankInfo, address: str, port: int, timeout: timedelta) -> Opened:
    shares = port != 0
    # With port 0 the system chooses a free port and binds it, so there is no race for it.
    listening = listen_at(address, port)
    if listening is not None:
        port = listening.getsockname()[1]
    try:
        store = TCPStore(
            address,
            port,
            info.world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            multi_tenant=shares,  # other stores in this process may use MASTER_PORT, too
            master_listen_fd=None if listening is None else listening.detach(),
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise LaunchError(
            f"MASTER_PORT is {port}, which is taken on {socket.gethostname()}: choose another, or "
            f"end the job that has it."
        ) from None
    return store, address, store.port


def _connect(info: RankInfo, address: str, port: int, timeout: timedelta) -> Opened:
    try:
        store = TCPStore(address, port, info.world_size, is_master=False, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError):
        raise LaunchError(
            f"rank {info.rank} on {socket.gethostname()} could not reach rank 0 at {address}:"
            f"{port} within {timeout.total_seconds():g} s: is it running, are MASTER_ADDR and "
            f"MASTER_PORT its own, and does a firewall let the port through?"
        ) from None
    return store, address, port


def _open_by_agent(
    info: RankInfo, address: str, port: int, timeout: timedelta, stack: ExitStack
) -> Opened:
    wait_for_name(address, "MASTER_ADDR")
    agents, _, _ = _connect(info, address, port, timeout)
    if info.rank == 0:
        store, _, own_port = _serve(info, address, 0, timeout)
        stack.enter_context(elastic_store.answering(agents, own_port))
    else:
        store, _, _ = _connect(info, address, elastic_store.ask_for_port(agents, info), timeout)
    return store, address, port


def _open_by_variables(info: RankInfo, address: str, port: int, timeout: timedelta) -> Opened:
    wait_for_name(address, "MASTER_ADDR")
    if info.rank == 0:
        return _serve(info, address, port, timeout)
    return _connect(info, address, port, timeout)


def _open_by_mpi(
    info: RankInfo, master: tuple[str | None, int | None], timeout: timedelta
) -> Opened:
    address, port = master
    try:
        world = mpi.communicator(info)
    except LaunchError:
        if address is None or port is None:
            raise
        return _open_by_variables(info, address, port, timeout)
    hosts = mpi.hosts(world)
    opened: Opened | None = None
    problem: LaunchError | None = None
    if info.rank == 0:
        try:
            opened = _serve(info, address or _own_address(hosts), port or 0, timeout)
        except LaunchError as error:
            problem = error
    address, port = mpi.broadcast_endpoint(world, problem or (opened and opened[1:]))
    return opened or _connect(info, address, port, timeout)


def _own_address(hosts: list[str]) -> str:
    """Return the address of this host at which the others reach it."""
    others = [host for host in hosts if host != socket.gethostname()]
    if not others:
        return "127.0.0.1"
    try:
        return address_towards(others[0])
    except OSError:  # their names do not resolve here
        return outward_address()


def _open_by_slurm(
    info: RankInfo,
    environ: Mapping[str, str],
    master: tuple[str | None, int | None],
    timeout: timedelta,
    stack: ExitStack,
) -> Opened:
    address, port = master
    source = "MASTER_ADDR"
    if address is None:
        address, source = slurm.first_host(environ)
    wait_for_name(address, source)
    if port is not None:
        return _open_by_variables(info, address, port, timeout)
    token = slurm.job_token(environ)
    if info.rank == 0:
        opened = _serve(info, address, 0, timeout)
        stack.enter_context(slurm.answering(token, opened[2]))
        return opened
    return _connect(info, address, slurm.ask_for_port(address, token, timeout), timeout)
