"""One rank of the jobs of test_distributed.py: joins, adds up the ranks, prints what it found."""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from belief_dist import distributed

warnings.simplefilter("ignore", FutureWarning)


def deepspeed_first() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile
    deepspeed.init_distributed("gloo", verbose=False)


def deepspeed_next() -> None:
    deepspeed_first()
    assert deepspeed_ranks() == (dist.get_rank(), dist.get_world_size())


def deepspeed_ranks() -> tuple[int, int]:
    from deepspeed import comm

    return comm.get_rank(), comm.get_world_size()


def main(how: str) -> None:
    timeout = timedelta(seconds=float(os.environ.get("TIMEOUT", "30")))
    if how == "deepspeed-first":
        deepspeed_first()
    try:
        world = distributed.init(timeout=timeout)
    except distributed.LaunchError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        sys.exit(2)
    assert distributed.init() is world
    if how == "deepspeed-next":
        deepspeed_next()
    if how == "twice":
        dist.barrier()
        dist.destroy_process_group()
        again = distributed.init(timeout=timeout)
        assert again == world
    total = torch.tensor(world.rank + 1)
    dist.all_reduce(total)
    found = {
        "rank": world.rank,
        "world_size": world.world_size,
        "local_rank": world.local_rank,
        "device": str(world.device),
        "backend": world.backend,
        "launcher": world.launcher,
        "total": total.item(),
        "exported": [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")],
        "master": os.environ.get("MASTER_ADDR") is not None,
        "mpi": "mpi4py" in sys.modules,
    }
    print(json.dumps(found) + "\n", end="", flush=True)
    # The script leaves gloo's threads the interpreter's lock at its end alone, as a busy one does:
    # without what init does there one to three of ten such processes abort.
    sys.setswitchinterval(5)
    for _ in range(3):
        dist.all_gather_object([None] * world.world_size, world.rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
