"""Rendezvous under mpirun: rank 0 broadcasts its address through MPI."""

from __future__ import annotations

import socket
import sys
from types import TracebackType
from typing import Any

from belief_dist.distributed.errors import LaunchError
from belief_dist.distributed.rank_info import OPEN_MPI, RankInfo


def communicator(info: RankInfo) -> Any:
    """Return COMM_WORLD, after checking that its ranks are those of the launcher.

    Raises:
        LaunchError: mpi4py is missing, or has loaded another MPI library than the launcher's.
    """
    try:
        import mpi4py
        from mpi4py import run

        # Initialized below, after the check of the library: with one that does not belong to the
        # launcher, MPI_Init may end the process.
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{info} needs mpi4py to agree on an address, and it does not load "
            f"({str(error).splitlines()[0]}): pip install 'belief_dist[mpi]', or set MASTER_ADDR "
            f"and MASTER_PORT."
        ) from error
    library = MPI.Get_library_version().splitlines()[0].split(",")[0].strip("\0 ")
    advice = (
        "start with the mpirun of that library, or name the launcher's own libmpi in MPI4PY_LIBMPI."
    )
    if ("Open MPI" in library) != (info.launcher == OPEN_MPI):
        raise LaunchError(f"{info}, but mpi4py has loaded {library!r}: {advice}")
    if not MPI.Is_initialized():
        MPI.Init_thread()
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (info.rank, info.world_size):
        raise LaunchError(
            f"{info}, but mpi4py has loaded {library!r}, in which this process is rank "
            f"{world.Get_rank()} of {world.Get_size()}: {advice}"
        )
    _abort_on_exceptions(run.set_abort_status)
    return world


def _abort_on_exceptions(set_abort_status: Any) -> None:
    """Make an uncaught exception on one rank end the job.

    Otherwise this rank waits in MPI_Finalize for the others, which wait for this rank.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        set_abort_status(error)

    sys.excepthook = hook


def hosts(world: Any) -> list[str]:
    """Return the host name of every rank; called by all ranks."""
    names: list[str] = world.allgather(socket.gethostname())
    return names


def broadcast_endpoint(
    world: Any, endpoint: tuple[str, int] | LaunchError | None
) -> tuple[str, int]:
    """Return rank 0's address and port, or raise its error; called by all ranks.

    Raises:
        LaunchError: On every rank, if rank 0 could not open its store.
    """
    answer: tuple[str, int] | LaunchError = world.bcast(endpoint, root=0)
    if isinstance(answer, LaunchError):
        raise answer
    return answer
