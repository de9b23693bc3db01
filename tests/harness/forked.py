"""Jobs whose ranks are forks of one process, which imports torch and DeepSpeed for all of them.

The imports take a process six seconds, what a rank then does in a test one. This process imports,
runs nothing, and forks the ranks of one job after another: each is a new process with arguments and
variables of its own, and begins a script as `python SCRIPT ...` does. Launchers are for
`tests.harness.launch`.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple, NoReturn

from benchmarks.jobs import free_port, run_job
from tests.harness.paths import BIN, ROOT

# What jobs import, but for this package. None of these may start a thread, which a fork would lose.
PRELOADED = [
    "torch",
    "torch._dynamo",  # by the first optimizer of a process
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.optim",
    "deepspeed",
    "jsonargparse",
    "matplotlib.pyplot",
    "rich.table",
]


class Job(NamedTuple):
    """How many ranks run the script, and with what arguments."""

    ranks: int
    arguments: Sequence[object]


def run_forked(
    script: Path, folder: Path, jobs: Sequence[Job], preloaded: Sequence[str] = PRELOADED
) -> list[subprocess.CompletedProcess[str]]:
    """Run a script's jobs one after another, whether they succeed or not.

    Args:
        script: What every rank runs.
        folder: Where.
        jobs: In this order.
        preloaded: Modules that are imported before any rank begins.

    Returns:
        For each job the first exit code of a rank that is not 0, and what its ranks have written.
    """
    outputs = Path(mkdtemp(prefix="forked-", dir=folder))
    described = [(job.ranks, [str(each) for each in job.arguments]) for job in jobs]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    lists = [json.dumps(each) for each in (described, [*preloaded])]
    command = [sys.executable, __file__, script, outputs, *lists]
    done = run_job(command, folder, environment, seconds=900)
    assert done.returncode == 0, done.stdout[-8000:]
    codes = json.loads((outputs / "codes").read_text())
    return [
        subprocess.CompletedProcess(
            [script, *arguments],
            code,
            *((outputs / f"{number}.{name}").read_text(errors="replace") for name in OUTPUTS),
        )
        for number, (code, (_, arguments)) in enumerate(zip(codes, described, strict=True))
    ]


def run_all_forked(script: Path, folder: Path, jobs: Sequence[Job], **more: Any) -> list[str]:
    """Run jobs that must succeed; return what each has written to standard output."""
    done = run_forked(script, folder, jobs, **more)
    for each in done:
        said = f"{each.args}: {each.returncode}\n{each.stdout[-4000:]}\n{each.stderr[-4000:]}"
        assert each.returncode == 0, said
    return [each.stdout for each in done]


OUTPUTS = ("stdout", "stderr")


def main() -> None:
    script, outputs, described, preloaded = sys.argv[1:]
    for name in json.loads(preloaded):
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
    codes = []
    for number, (ranks, arguments) in enumerate(json.loads(described)):
        port = str(free_port())
        left = set()
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, ranks, port, [script, *arguments], Path(outputs, str(number)))
            left.add(pid)
        codes.append(0)
        while left:
            pid, status = os.wait()
            left.remove(pid)
            if status != 0 and codes[-1] == 0:
                codes[-1] = os.waitstatus_to_exitcode(status)
                for other in left:  # which may wait for it
                    os.kill(other, signal.SIGKILL)
    Path(outputs, "codes").write_text(json.dumps(codes))


def _be_rank(rank: int, ranks: int, port: str, arguments: list[str], output: Path) -> NoReturn:
    """Run a script as a new process would; end this one."""
    code = 1
    try:
        for number, name in enumerate(OUTPUTS, start=1):
            file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(file, number)
        if ranks > 1:  # one rank has no launcher, and does without its variables
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
