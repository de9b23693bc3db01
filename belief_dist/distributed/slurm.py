"""Rendezvous under srun, which does not set a port.

Rank 0 listens on one of a few ports that are derived from the job's id. A port that another
program uses is skipped by both sides, because an answer must repeat the job's token.
"""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from belief_dist.distributed.errors import LaunchError

# Below 32768, where the range begins from which Linux takes ports for outgoing connections.
_PORTS = range(20000, 30000)
_NUM_CANDIDATES = 8
_PATIENCE = 2.0  # seconds after which a port that does not answer is another program's


def first_host(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the host of rank 0, and the variable from which it is known.

    Raises:
        LaunchError: There is no node list, or it cannot be parsed.
    """
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return _first(environ[name], name), name
    raise LaunchError(
        "SLURM_PROCID is set, but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST tells the "
        "hosts: set MASTER_ADDR to rank 0's host."
    )


def _first(nodes: str, name: str) -> str:
    """Return the first name of a compressed list such as "gpu[03-05,7]-ib,login1"."""
    # The first element ends at the first comma outside brackets.
    element = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodes)
    if element is None:
        raise LaunchError(f"{name} is {nodes!r}, which is not a list of hosts: set MASTER_ADDR.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", element[0])


def job_token(environ: Mapping[str, str]) -> str:
    """Return a string that is unique to this step of this job and this run after a requeue."""
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return "belief_dist " + ".".join(environ.get(name, "-") for name in names)


def candidate_ports(token: str) -> list[int]:
    """Return the ports on which rank 0 of a job may listen, in the order they are tried."""
    return random.Random(token).sample(_PORTS, _NUM_CANDIDATES)


@contextmanager
def answering(token: str, store_port: int) -> Iterator[None]:
    """Answer requests that carry the job's token with the store's port; called by rank 0.

    Raises:
        LaunchError: All candidate ports are taken.
    """
    with _listen(candidate_ports(token)) as server:
        threading.Thread(
            target=_answer, args=(server, token, store_port), daemon=True, name="belief_dist port"
        ).start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)  # ends the thread's accept()


def _listen(ports: list[int]) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    for port in ports:
        try:
            return socket.create_server(
                ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=4096
            )
        except OSError:
            continue
    raise LaunchError(
        f"the ports {', '.join(map(str, ports))} of {socket.gethostname()}, which this job's id "
        f"gives, are all taken: set MASTER_PORT to a free one."
    )


def _answer(server: socket.socket, token: str, store_port: int) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return  # closed
        with connection:
            connection.settimeout(_PATIENCE)
            try:
                if connection.recv(256).decode(errors="replace") == token:
                    connection.sendall(f"{token} {store_port}".encode())
            except OSError:
                continue


def ask_for_port(host: str, token: str, timeout: timedelta) -> int:
    """Return the port of rank 0's store; called by the other ranks.

    Raises:
        LaunchError: Rank 0 did not answer in time.
    """
    ports = candidate_ports(token)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        for port in ports:
            answer = _ask(host, port, token)
            if answer is not None:
                return answer
        time.sleep(0.2)
    raise LaunchError(
        f"rank 0 did not answer on {host}, ports {', '.join(map(str, ports))}, within "
        f"{timeout.total_seconds():g} s: is it running, and does a firewall let these ports "
        f"through? MASTER_ADDR and MASTER_PORT choose others."
    )


def _ask(host: str, port: int, token: str) -> int | None:
    try:
        with socket.create_connection((host, port), timeout=_PATIENCE) as connection:
            connection.sendall(token.encode())
            answer = connection.recv(256).decode(errors="replace")
    except OSError:
        return None
    found, _, number = answer.rpartition(" ")
    return int(number) if found == token and number.isdigit() else None
