"""Read rank and world size from the environment variables of the known launchers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from belief_dist.distributed.errors import LaunchError


@dataclass(frozen=True)
class RankInfo:
    """What the environment says about this process.

    Attributes:
        launcher: What started it, for messages.
        rank: In 0..world_size-1.
        world_size: Number of processes.
        local_rank: Index among the processes on this host; None if the launcher does not set it.
        local_world_size: Number of processes on this host; None if the launcher does not set it.
        names: The environment variables of rank, world size and local rank, for messages.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None
    names: tuple[str, str, str]

    def __str__(self) -> str:
        """Return what the environment says, for messages."""
        rank, size, _ = self.names
        return f"{rank}={self.rank} and {size}={self.world_size} ({self.launcher})"


ALONE = RankInfo("nobody: alone", 0, 1, 0, 1, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))

OPEN_MPI = "mpirun of Open MPI"
HYDRA = "mpirun of MPICH or Intel MPI"
SLURM = "srun"


def read_rank_info(environ: Mapping[str, str]) -> RankInfo:
    """Return this process's rank, world size and launcher.

    Launchers may be nested (mpirun inside a Slurm job, torchrun inside srun); the innermost one
    decides.

    Args:
        environ: The process's environment.

    Raises:
        LaunchError: A variable is missing or has an impossible value, or two launchers disagree.
    """
    by_variables = _torch_variables(environ)
    others = [
        info for info in (_open_mpi(environ), _hydra(environ), _slurm(environ)) if info is not None
    ]
    if by_variables is not None:
        if by_variables.launcher == _BY_HAND:
            for other in others:
                _check_nested(by_variables, other)
        return by_variables
    mpi = [info for info in others if info.launcher != SLURM]
    if len(mpi) == 2:
        raise LaunchError(
            f"two launchers claim this process: {mpi[0]} and {mpi[1]}; unset the variables that an "
            f"outer job has left."
        )
    return others[0] if others else ALONE


_BY_HAND = "RANK and WORLD_SIZE"


def _torch_variables(environ: Mapping[str, str]) -> RankInfo | None:
    """Read the variables that torchrun or the deepspeed launcher set, or that were set by hand."""
    if "RANK" not in environ:
        if "WORLD_SIZE" in environ and not _is_set_by_another(environ):
            size = _integer(environ, "WORLD_SIZE")
            if size > 1:
                raise LaunchError(
                    f"WORLD_SIZE is {size}, but RANK is not set: set both, or start the job with a "
                    f"launcher."
                )
        return None
    launcher = _BY_HAND
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    elif "CROSS_SIZE" in environ and "LOCAL_SIZE" in environ:
        launcher = "the deepspeed launcher"
    return _from_variables(
        environ,
        launcher,
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environ else "LOCAL_SIZE",
    )


def _is_set_by_another(environ: Mapping[str, str]) -> bool:
    return any(name in environ for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_STEP_ID"))


def _open_mpi(environ: Mapping[str, str]) -> RankInfo | None:
    if "OMPI_COMM_WORLD_RANK" not in environ and "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    return _from_variables(
        environ,
        OPEN_MPI,
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    )


def _hydra(environ: Mapping[str, str]) -> RankInfo | None:
    if "PMI_RANK" not in environ and "PMI_SIZE" not in environ:
        return None
    if "MPI_LOCALRANKID" not in environ and "SLURM_STEP_ID" in environ:
        return None  # srun --mpi=pmi2: _slurm reads the same ranks, and needs no MPI for the port
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
    return _from_variables(environ, HYDRA, names, "MPI_LOCALNRANKS")


def _slurm(environ: Mapping[str, str]) -> RankInfo | None:
    # A batch script, too, has SLURM_PROCID=0, but only the processes of a step are ranks.
    in_script = "SLURM_STEP_ID" not in environ and environ.get("SLURM_PROCID", "0") == "0"
    if "SLURM_PROCID" not in environ or in_script:
        return None
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    here = None
    nodes, tasks = environ.get("SLURM_NNODES", ""), environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if nodes == "1" or environ.get("SLURM_STEP_NUM_NODES") == "1":
        here = size
    elif tasks.split("(")[0].isdigit() and "," not in tasks:
        # "2(x3)": two tasks on each of three nodes.
        environ = {**environ, "SLURM_STEP_TASKS_PER_NODE": tasks.split("(")[0]}
        here = "SLURM_STEP_TASKS_PER_NODE"
    return _from_variables(environ, SLURM, ("SLURM_PROCID", size, "SLURM_LOCALID"), here)


def _from_variables(
    environ: Mapping[str, str],
    launcher: str,
    names: tuple[str, str, str],
    local_world_size: str | None,
) -> RankInfo:
    rank_name, size_name, local_name = names
    for present, absent in ((rank_name, size_name), (size_name, rank_name)):
        if present in environ and absent not in environ:
            raise LaunchError(
                f"{present} is {environ[present]!r}, but {absent} is not set: set both, or start "
                f"the job with a launcher."
            )
    rank, size = _integer(environ, rank_name), _integer(environ, size_name)
    if not 0 <= rank < size:
        raise LaunchError(
            f"{rank_name} is {rank} and {size_name} is {size}: a rank is in 0..{size_name}-1."
        )
    local = _integer(environ, local_name) if local_name in environ else None
    here = None
    if local_world_size is not None and local_world_size in environ:
        here = _integer(environ, local_world_size)
    if local is not None and not 0 <= local < (here or size):
        limit = size_name if here is None else local_world_size
        raise LaunchError(
            f"{local_name} is {local} and {limit} is {here or size}: a local rank is in "
            f"0..{limit}-1."
        )
    return RankInfo(launcher, rank, size, local, here, names)


def _check_nested(inner: RankInfo, outer: RankInfo) -> None:
    """Check ranks set by hand against the launcher around them, which may have started fewer."""
    same_size_other_rank = inner.world_size == outer.world_size and inner.rank != outer.rank
    if inner.world_size < outer.world_size or same_size_other_rank:
        raise LaunchError(
            f"two launchers claim this process: {inner} and {outer}; unset RANK and WORLD_SIZE, or "
            f"set them as the launcher does."
        )


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise LaunchError(f"{name} must be an integer, got {environ[name]!r}.") from None
