"""torch.distributed over MPI: importing this registers the backend "mpi4py".

    import belief_dist.mpi_backend

    group = torch.distributed.new_group(backend="mpi4py")
    optimizer = ShardedAdaBelief(model.parameters(), process_group=group)

or `init_process_group("mpi4py", ...)`, in a job that an MPI launcher has started.
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
    """Start MPI, with the first group and not with the import; waits for all processes of the job.

    If they do not come within `timeout`, this process shows where it stands, and ends.
    """
    # mpi4py holds the interpreter's lock meanwhile: no thread of Python can watch over it.
    faulthandler.dump_traceback_later(timeout.total_seconds(), exit=True)
    try:
        from mpi4py import MPI  # noqa: F401  # starts MPI
    finally:
        faulthandler.cancel_dump_traceback_later()


if BACKEND not in dist.Backend.backend_list:
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
