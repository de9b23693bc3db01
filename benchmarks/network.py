"""A network of slow links between processes of this machine: one network namespace per rank.

Every namespace has one interface, on a bridge; `tc tbf` limits what it sends and what it is sent.
The link is as slow as asked, its delay is that of this machine (a few microseconds). Needs root.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_CLONE_NEWNET = 0x40000000
INTERFACE = "eth0"


def missing_tools() -> str | None:
    """Return why no network can be made here, or None."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (apt install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    return None


class Network:
    """Namespaces on a bridge, while the context lasts.

    Raises:
        RuntimeError: A command fails; says which and why.
    """

    def __init__(self, ranks: int, gbit: float | None) -> None:
        """Describe `ranks` namespaces with links of `gbit` Gbit/s both ways, or unlimited ones."""
        why = missing_tools()
        if why is not None:
            raise RuntimeError(f"cannot make a network of {ranks} namespaces: {why}.")
        self._tag = uuid.uuid4().hex[:6]
        self._ranks, self._gbit = ranks, gbit

    def namespace(self, rank: int) -> str:
        """Return the name of a rank's namespace."""
        return f"bd{self._tag}r{rank}"

    @property
    def _hub(self) -> str:
        return f"bd{self._tag}hub"

    def __enter__(self) -> Network:
        """Make everything."""
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove everything."""
        self._remove()

    def _make(self) -> None:
        hub = self._hub
        _run(f"ip netns add {hub}")
        _run(f"ip -n {hub} link add br0 type bridge")
        _run(f"ip -n {hub} link set br0 up")
        for rank in range(self._ranks):
            name, port = self.namespace(rank), f"p{rank}"
            _run(f"ip netns add {name}")
            _run(f"ip link add {INTERFACE} netns {name} type veth peer name {port} netns {hub}")
            _run(f"ip -n {hub} link set {port} master br0 up")
            _run(f"ip -n {name} addr add 10.77.0.{10 + rank}/24 dev {INTERFACE}")
            _run(f"ip -n {name} link set {INTERFACE} up")
            _run(f"ip -n {name} link set lo up")
            if self._gbit is not None:
                # What half a millisecond sends. What is shorter than the largest segment before
                # it is cut into packets makes tbf cut it, and the many packets get lost.
                burst = max(256 << 10, int(self._gbit * 1e9 / 8 * 0.5e-3))
                limit = f"rate {self._gbit}gbit burst {burst} latency 50ms"
                _run(f"tc -n {name} qdisc add dev {INTERFACE} root tbf {limit}")
                _run(f"tc -n {hub} qdisc add dev {port} root tbf {limit}")

    def plug(self, rank: int, state: str) -> None:
        """Pull a rank's cable at the bridge, "down", or put it back, "up"; from any process."""
        _run(f"ip -n {self._hub} link set p{rank} {state}")

    def lose(self, share: float) -> None:
        """From now on, lose this share of the packets that go to each rank, at random.

        Needs nothing but htb of the kernel's queues: packets that a filter draws at random go to a
        queue without room.
        """
        # Load a random word; unless it is below the limit, nothing matches: see bpf(2), cBPF.
        random_word, limit = 0xFFFFF000 + 56, int(share * 2**32)
        program = f"4,32 0 0 {random_word},53 1 0 {limit},6 0 0 {2**32 - 1},6 0 0 0"
        for port in (f"p{rank}" for rank in range(self._ranks)):
            tc = f"tc -n {self._hub}"
            _run(f"{tc} qdisc add dev {port} root handle 1: htb default 10 r2q 100000")
            for number in (10, 20):
                limits = "htb rate 40gbit burst 10m cburst 10m"
                _run(f"{tc} class add dev {port} parent 1: classid 1:{number} {limits}")
            _run(f"{tc} qdisc add dev {port} parent 1:20 handle 20: pfifo limit 0")
            drawn = [*f"{tc} filter add dev {port} parent 1: protocol all bpf".split()]
            _run([*drawn, "bytecode", program, "flowid", "1:20"])

    def lost(self) -> int:
        """Return how many packets `lose` has lost so far."""
        found = 0
        for rank in range(self._ranks):
            said = _run(f"tc -n {self._hub} -s qdisc show dev p{rank}")
            queue = said.partition("qdisc pfifo 20:")[2]
            found += int(re.findall(r"dropped (\d+)", queue)[0])
        return found

    def _remove(self) -> None:
        for name in (*(self.namespace(rank) for rank in range(self._ranks)), self._hub):
            with suppress(RuntimeError):  # it was never made
                _run(f"ip netns delete {name}")


def _run(command: str | list[str]) -> str:
    words = command.split() if isinstance(command, str) else command
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)!r} failed: {done.stderr.strip()}")
    return done.stdout


def enter(namespace: str) -> None:
    """Move this process, and the sockets it will open, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as handle:
        if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


def bytes_sent() -> int:
    """Return the bytes that have left this process's namespace so far, headers included."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counters.split()[8])
    raise RuntimeError("this process has not entered a namespace of `Network`.")
