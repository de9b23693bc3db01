"""torch.distributed over MPI: importing this registers the backend "mpi4py".

    import belief_dist.integrations.mpi

    group = torch.distributed.new_group(backend="mpi4py")
    optimizer = ShardedAdaBelief(model.parameters(), process_group=group)

or `init_process_group("mpi4py", ...)`, in a job that an MPI launcher has started.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

BACKEND = "mpi4py"


def _create(options: Any, backend_options: Any) -> dist.ProcessGroup:
    # MPI starts with the first group and not with the import.
    from belief_dist.integrations.mpi.group import create_group

    return create_group(options)


if BACKEND not in dist.Backend.backend_list:
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
