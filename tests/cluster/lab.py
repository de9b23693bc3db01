"""Several hosts on this machine: namespaces with own address, name, processes, mounts and sshd.

They are joined by a bridge and share the file system, as if it were NFS. Everything ends with the
process that made it, even if that is killed; names that are left are removed by the next lab.

Whoever logs in has a home in the lab's folder: what lies in the user's, such as start-up files of a
shell that hang, is not read, and nothing is written there.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

INTERFACE = "eth0"
_TOOLS = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "mpirun.openmpi": "openmpi-bin",
    "slurmctld": "slurm-wlm",
    "munged": "munge",
}


def why_not() -> str | None:
    """Return why no lab can be made here, or None."""
    if os.geteuid() != 0:
        return "the cluster's nodes are namespaces, which need root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = sorted({p for tool, p in _TOOLS.items() if not shutil.which(tool, path=path)})
    if missing:
        return f"not installed: {', '.join(missing)} (run tests/install.sh)"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "true"],
        capture_output=True,
        text=True,
    )
    if probe.returncode != 0:
        return f"no namespaces here: {probe.stderr.strip()}"
    return None


def run(*command: object) -> str:
    """Run a command that must succeed; return what it prints."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed: {done.stderr.strip()}")
    return done.stdout


class Node:
    """One host.

    Attributes:
        name: Of the host, which all nodes resolve.
        address: Of its interface `INTERFACE`.
        pid: Of its first process, sshd, seen from outside.
        daemons: Numbers of the processes that serve jobs, and are none.
    """

    def __init__(self, number: int, lab: str, folder: Path) -> None:
        self.name = f"node{number}"
        self.address = f"10.77.0.{10 + number}"
        self.namespace = f"{lab}-{self.name}"
        self._hub = f"{lab}-hub"
        self.port = f"p{number}"
        self.pid = 0
        self.daemons: set[int] = set()
        self._folder = folder
        self._home = folder / "home"
        self._outer: subprocess.Popen[bytes] | None = None

    def plug_in(self) -> None:
        """Make its network, on the bridge."""
        run("ip", "netns", "add", self.namespace)
        run(
            *("ip", "link", "add", INTERFACE, "netns", self.namespace),
            *("type", "veth", "peer", "name", self.port, "netns", self._hub),
        )
        run("ip", "-n", self._hub, "link", "set", self.port, "master", "br0", "up")
        run("ip", "-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", INTERFACE)
        run("ip", "-n", self.namespace, "link", "set", INTERFACE, "up")
        run("ip", "-n", self.namespace, "link", "set", "lo", "up")

    def boot(self) -> None:
        """Start its first process; those that follow end with it."""
        etc = self._folder / self.name
        script = f"""
            set -e
            hostname {self.name}
            mount -t tmpfs -o size=8g tmpfs /dev/shm
            mount --bind {etc}/hosts /etc/hosts
            mount --bind {etc}/passwd /etc/passwd
            mount --bind {etc}/ssh /etc/ssh
            mkdir -p /run/sshd
            exec /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config
        """
        log = (self._folder / f"{self.name}.log").open("ab")
        with log:
            self._outer = subprocess.Popen(
                # pdeathsig: the node ends with this process. kill-child: so does all within.
                [
                    *f"setpriv --pdeathsig KILL nsenter --net=/run/netns/{self.namespace}".split(),
                    *"unshare --uts --ipc --pid --mount --fork --kill-child --mount-proc".split(),
                    *("bash", "-c", script),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )

    def wait_until_up(self) -> None:
        """Wait for its sshd.

        Raises:
            RuntimeError: It has not come up within 30 seconds; says what it has logged.
        """
        assert self._outer is not None
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self._outer.poll() is None:
            for pid in children.read_text().split():
                with suppress(OSError):
                    name = Path(f"/proc/{pid}/comm").read_text().strip()
                    if name == "sshd" and self._listening():
                        self.pid = int(pid)
                        return
            time.sleep(0.02)
        raise RuntimeError(
            f"{self.name} did not come up: {(self._folder / f'{self.name}.log').read_text()}"
        )

    def _listening(self) -> str:
        return run("ip", "netns", "exec", self.namespace, "ss", "-Htln", "sport = :22").strip()

    def shut_down(self) -> None:
        """End all its processes, if it is up."""
        if self._outer is not None:
            self._outer.kill()
            self._outer.wait(10)

    def crash(self) -> None:
        """End all its processes at once, as a loss of power does."""
        assert self._outer is not None
        os.kill(self.pid, signal.SIGKILL)
        self._outer.wait(10)

    def pids(self) -> dict[int, str]:
        """Return the processes of jobs on this node, by their number outside: all but daemons."""
        found = {}
        assert self._outer is not None
        for pid in map(int, run("ip", "netns", "pids", self.namespace).split()):
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                if pid not in (self.pid, self._outer.pid) and pid not in self.daemons:
                    found[pid] = command.decode(errors="replace").strip()
        return found

    def command(self, *command: object) -> list[str]:
        """Return a command that runs another on this node."""
        inside = f"nsenter -t {self.pid} -n -u -i -p -m --wdns=/".split()
        home = ["env", f"HOME={self._home}"]
        return ["setpriv", "--pdeathsig", "KILL", *inside, *home, *map(str, command)]

    def run(self, *command: object) -> str:
        """Run a short command on this node, which must succeed; return what it prints."""
        return run(*self.command(*command))

    def mount(self, source: Path, target: Path) -> None:
        """Let this node alone see `source` in the place of `target`."""
        self.run("mount", "--bind", source, target)

    def unmount(self, target: Path) -> None:
        """Undo `mount`."""
        self.run("umount", target)

    def plug(self, state: str) -> None:
        """Pull the cable at the bridge, "down", or put it back, "up"."""
        run("ip", "-n", self._hub, "link", "set", self.port, state)


class Lab:
    """Nodes on a bridge, while the context lasts; a second lab of the same name waits for its end.

    Attributes:
        name: What the names of its namespaces begin with.
        folder: Where keys, logs and settings lie.
        nodes: node0, node1, ...
    """

    def __init__(self, num_nodes: int, folder: Path, name: str = "belief") -> None:
        self.name = name
        self.folder = folder
        self.nodes = [Node(number, name, folder) for number in range(num_nodes)]
        self._stack = ExitStack()

    def __enter__(self) -> Lab:
        with ExitStack() as stack:
            # The kernel frees it when this process ends, however it ends.
            lock = stack.enter_context(Path(f"/run/lock/{self.name}-lab").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._remove()  # what is left of one that was killed
            stack.callback(self._remove)
            for node in self.nodes:
                stack.callback(node.shut_down)
            self._make()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _make(self) -> None:
        for name in ("host", "id"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name)
        home = self.folder / "home"
        home.mkdir(mode=0o700)
        # ssh and sshd ask for root's home here, not the variable.
        names = Path("/etc/passwd").read_text().splitlines(keepends=True)
        names = [line for line in names if not line.startswith("root:")]
        names.insert(0, f"root:x:0:0:root:{home}:/bin/bash\n")
        hosts = [f"{node.address} {node.name}\n" for node in self.nodes]
        hub = f"{self.name}-hub"
        run("ip", "netns", "add", hub)
        run("ip", "-n", hub, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", hub, "link", "set", "br0", "up")
        for node in self.nodes:
            ssh = self.folder / node.name / "ssh"
            ssh.mkdir(parents=True)
            (ssh.parent / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
            (ssh.parent / "passwd").write_text("".join(names))
            shutil.copy(self.folder / "id.pub", ssh / "authorized_keys")
            (ssh / "ssh_config").write_text(_SSH_CONFIG.format(key=self.folder / "id"))
            (ssh / "sshd_config").write_text(
                _SSHD_CONFIG.format(key=self.folder / "host", address=node.address)
            )
            node.plug_in()
            node.boot()
        for node in self.nodes:
            node.wait_until_up()

    def left_over(self) -> list[str]:
        """Return the namespaces of labs of this name."""
        names = [line.split()[0] for line in run("ip", "netns", "list").splitlines() if line]
        return [n for n in names if re.fullmatch(rf"{self.name}-(hub|node\d+)", n)]

    def _remove(self) -> None:
        """Remove the namespaces of any lab of this name, processes first."""
        for name in self.left_over():
            for _ in range(100):
                pids = run("ip", "netns", "pids", name).split()
                for pid in map(int, pids):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                if not pids:
                    break
                time.sleep(0.05)
        for name in self.left_over():
            run("ip", "netns", "delete", name)

    def pids(self) -> dict[int, str]:
        """Return the processes of jobs on all nodes."""
        return {pid: command for node in self.nodes for pid, command in node.pids().items()}

    def job(
        self,
        commands: Mapping[int, Sequence[object]],
        environment: Mapping[str, str],
        folder: Path,
        timeout: float,
    ) -> Job:
        """Start a command on each of some nodes; see `Job`."""
        return Job(self, commands, environment, folder, timeout)


class Job:
    """Commands on nodes that belong together, and all that they start.

    Attributes:
        seconds: How long it took until the last command ended; set by `wait`.
    """

    def __init__(
        self,
        lab: Lab,
        commands: Mapping[int, Sequence[object]],
        environment: Mapping[str, str],
        folder: Path,
        timeout: float,
    ) -> None:
        self._lab = lab
        self._deadline = time.monotonic() + timeout
        self._started = time.monotonic()
        self.seconds = 0.0
        self._output = folder / f"output-{time.monotonic_ns()}.txt"
        with self._output.open("ab") as output:
            self._processes = [
                subprocess.Popen(
                    lab.nodes[number].command("env", f"--chdir={folder}", *command),
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for number, command in commands.items()
            ]

    @property
    def output(self) -> str:
        """Return what all commands have said so far."""
        return self._output.read_text(errors="replace")

    @property
    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._started

    def wait(self) -> list[int]:
        """Wait for all commands; return their exit statuses.

        Raises:
            AssertionError: A command has not ended in time; everything is killed then.
        """
        try:
            for process in self._processes:
                process.wait(max(0.1, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            left = self._lab.pids()
            self.kill()
            raise AssertionError(f"hangs: {left}\n{self.output[-8000:]}") from None
        self.seconds = self.elapsed
        return [process.returncode for process in self._processes]

    def kill(self) -> None:
        """End everything that jobs have started, on all nodes."""
        for _ in range(50):
            for pid in self._lab.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not self._lab.pids():
                break
            time.sleep(0.1)
        for process in self._processes:
            process.wait(10)


_SSH_CONFIG = """\
Host *
  IdentityFile {key}
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""

_SSHD_CONFIG = """\
HostKey {key}
AuthorizedKeysFile /etc/ssh/authorized_keys
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
MaxStartups 100
ListenAddress {address}
"""
