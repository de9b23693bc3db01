"""Starts processes with the mpiexec of the MPI library that mpi4py loads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_ASK = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().splitlines()[0].strip(chr(0)))
print(next(line.split()[-1] for line in open("/proc/self/maps") if "/libmpi.so" in line))
"""


@dataclass(frozen=True)
class Launcher:
    """An mpiexec and what it needs to start any number of ranks on this machine.

    Attributes:
        library: The name of the MPI library, with its version.
        program: The mpiexec.
    """

    library: str
    program: Path

    @property
    def is_open_mpi(self) -> bool:
        """Whether it is Open MPI's, whose options are its own."""
        return self.library.startswith("Open MPI")

    @property
    def environment(self) -> dict[str, str]:
        """This process's variables, and those that let root start more ranks than cores."""
        more = {"I_MPI_PIN": "0"}
        for prefix in ("OMPI", "PRTE"):
            more |= {f"{prefix}_ALLOW_RUN_AS_ROOT{end}": "1" for end in ("", "_CONFIRM")}
        return {**os.environ, **more}

    def command(self, ranks: int, *arguments: object, options: tuple[str, ...] = ()) -> list[str]:
        """Return the command that runs Python with `arguments` on every rank."""
        if self.is_open_mpi:
            options = ("--oversubscribe", "--bind-to", "none", *options)
        program = [sys.executable, *map(str, arguments)]
        return [str(self.program), *options, "-n", str(ranks), *program]


def find_launcher() -> Launcher:
    """Return the launcher of the library that mpi4py loads in this environment.

    Raises:
        RuntimeError: There is no mpi4py, no MPI library, or no mpiexec beside it.
    """
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True)
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"mpi4py loads no MPI library ({why}): pip install 'belief_dist[mpi]'.")
    library, path = done.stdout.splitlines()
    places = [folder / "bin" / "mpiexec" for folder in Path(path).resolve().parents]
    found = next((place for place in places if os.access(place, os.X_OK)), None)
    if found is None:
        raise RuntimeError(f"{library} in {path} has no bin/mpiexec beside it: install it.")
    name = library.split(",")[0].replace("Version:", "")
    return Launcher(" ".join(name.split()), found)
