"""torch.distributed over MPI: importing this module registers the backend "mpi4py".

    import belief_dist.mpi_backend

    group = torch.distributed.new_group(backend="mpi4py")
    optimizer = ShardedAdaBelief(model.parameters(), process_group=group)

or `init_process_group("mpi4py", ...)`, in a job started by an MPI launcher.
"""

from __future__ import annotations

import faulthandler
from datetime import timedelta
from typing import Any

import torch.distributed as dist

BACKEND = "mpi4py"


def _create(options: Any, backend_options: Any) -> dist.ProcessGroup:
    _start_mpi(options.timeout)
    from belief_dist.mpi_backend.group import create_group

    return create_group(options)


def _start_mpi(timeout: timedelta) -> None:
    """Initialize MPI, which waits for all processes of the job; called for the first group.

    After `timeout` this process prints its stack and exits.
    """
    # Not by a Watch: mpi4py holds the GIL during MPI_Init, so a Python thread could not exit.
    faulthandler.dump_traceback_later(timeout.total_seconds(), exit=True)
    try:
        from mpi4py import MPI  # noqa: F401  # initializes MPI
    finally:
        faulthandler.cancel_dump_traceback_later()


if BACKEND not in dist.Backend.backend_list:
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
