"""Runs a launcher's command to its end, and leaves none of its processes behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    """Return a port of this host that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def run_job(
    command: Sequence[object], folder: Path, environment: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run a command; its result holds what it has written to both outputs as `stdout`.

    Args:
        command: Program and arguments, made strings here.
        folder: Where it runs.
        environment: All of its variables.
        seconds: After which it is killed.

    Raises:
        subprocess.TimeoutExpired: It was.
    """
    arguments = list(map(str, command))
    with subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a launcher that hangs has ranks, too
    return subprocess.CompletedProcess(arguments, process.returncode, output)
