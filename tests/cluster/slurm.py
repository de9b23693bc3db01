"""Slurm over the nodes of a lab: slurmctld and munge on the first node, slurmd on every one."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lab import Lab


@contextmanager
def cluster(lab: Lab) -> Iterator[dict[str, str]]:
    """Run Slurm's daemons on all nodes; yield the environment that reaches them.

    Raises:
        RuntimeError: The nodes are not idle within 60 seconds; says what the daemons have logged.
    """
    folder = lab.folder / "slurm"
    _write_configuration(lab, folder)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    started = []

    def daemon(number: int, *command: object) -> None:
        log = folder / f"{Path(str(command[0])).name}.{number}.out"
        with log.open("wb") as output:
            started.append(
                subprocess.Popen(
                    lab.nodes[number].command(*command),
                    env=os.environ | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                    start_new_session=True,
                )
            )

    munge = folder / "munge"
    # One for all nodes: a socket in the file system reaches everyone who sees the file. By force,
    # as it lies in a folder of root's alone.
    daemon(
        *(0, "/usr/sbin/munged", "--foreground", "--force", f"--key-file={munge}/key"),
        *(f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--log-file={munge}/log"),
        f"--seed-file={munge}/seed",
    )
    for node in lab.nodes:
        node.run("bash", "-c", _FREEZER)
    daemon(0, "/usr/sbin/slurmctld", "-D")
    for number, node in enumerate(lab.nodes):
        daemon(number, "/usr/sbin/slurmd", "-D", "-N", node.name)
    try:
        _wait_until_idle(lab, folder, environment)
        for node in lab.nodes:
            node.daemons = set(node.pids())
        yield environment
    finally:
        for node in lab.nodes:
            node.daemons = set()
            for pid in node.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in started:
            process.wait(10)


def _wait_until_idle(lab: Lab, folder: Path, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 60
    said = ""
    while time.monotonic() < deadline:
        done = subprocess.run(
            lab.nodes[0].command("sinfo", "-h", "-t", "idle", "-o", "%D"),
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        said = done.stdout + done.stderr
        if done.stdout.strip() == str(len(lab.nodes)):
            return
        time.sleep(0.1)
    logs = "".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.out"))
    raise RuntimeError(f"Slurm's nodes are not idle: {said}\n{logs}")


# slurmd 22.05 does not start without one, though nothing here uses it.
_FREEZER = """
mountpoint -q /sys/fs/cgroup/freezer && exit
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir /sys/fs/cgroup/freezer
mount -t cgroup -o freezer cgroup /sys/fs/cgroup/freezer
"""


def batch(*arguments: object) -> list[object]:
    """Return a command that submits a batch job and ends with it; `sbatch --wait` looks rarely."""
    script = """
        job=$(sbatch --parsable "$@") || exit
        while [[ -n $(squeue --noheader --jobs "$job" 2>/dev/null) ]]; do sleep 0.2; done
        scontrol --oneliner show job "$job" | grep -q " JobState=COMPLETED .* ExitCode=0:0 "
    """
    return ["bash", "-c", script, "batch", *arguments]


def _write_configuration(lab: Lab, folder: Path) -> None:
    munge = folder / "munge"
    munge.mkdir(parents=True)
    (munge / "key").write_bytes(secrets.token_bytes(1024))
    (munge / "key").chmod(0o400)
    (folder / "state").mkdir()
    for node in lab.nodes:
        (folder / "state" / f"spool.{node.name}").mkdir()
    nodes = "\n".join(
        f"NodeName={n.name} NodeAddr={n.address} CPUs=4 RealMemory=1000 State=UNKNOWN"
        for n in lab.nodes
    )
    (folder / "slurm.conf").write_text(
        _SLURM_CONF.format(
            folder=folder, nodes=nodes, controller=f"{lab.nodes[0].name}({lab.nodes[0].address})"
        )
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


_SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/state/spool.%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/state/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=30
InactiveLimit=0
KillWait=5
TmpFS=/dev/shm
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
