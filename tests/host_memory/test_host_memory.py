"""Memory that processes of a host share: where it comes from, where it goes, who waits for whom."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from belief_dist.host_memory import Arena, arena, meet, team
from belief_dist.kernels.build import Unavailable
from belief_dist.kernels.signals import NBYTES, Signals, addresses

# - Sequence numbers


@pytest.fixture
def number() -> tuple[Signals, int, Any]:
    memory = torch.zeros(NBYTES, dtype=torch.uint8)
    return Signals(), memory.data_ptr() // NBYTES * NBYTES, memory


def test_a_number_is_waited_for(number: tuple[Signals, int, Any]) -> None:
    signals, address, _ = number
    waits = addresses([address])
    assert signals.first_late(waits, 1) == 0
    began = time.monotonic()
    assert signals.first_late(waits, 1, 0.05) == 0
    assert time.monotonic() - began >= 0.05
    post = threading.Timer(0.05, signals.post, (address, 1))
    post.start()
    assert signals.first_late(waits, 1, 20.0) is None
    assert time.monotonic() - began < 10  # it was woken
    post.join()


def test_numbers_wrap_around(number: tuple[Signals, int, Any]) -> None:
    signals, address, _ = number
    waits = addresses([address])
    signals.post(address, 2**32 - 1)
    assert signals.first_late(waits, 2**32 - 1) is None
    assert signals.first_late(waits, 2**32) == 0
    signals.post(address, 2**32)
    assert signals.first_late(waits, 2**32) is None
    assert signals.first_late(waits, 2**32 - 5) is None


def test_a_hundred_thousand_numbers_pass_between_two_threads() -> None:
    """Neither may sleep through a post; both would then wait for ever."""
    signals = Signals()
    memory = torch.zeros(3 * NBYTES, dtype=torch.uint8)
    first = -(-memory.data_ptr() // NBYTES) * NBYTES
    ping, pong, rounds = first, first + NBYTES, 100_000

    def answer() -> None:
        waits = addresses([ping])
        for turn in range(1, rounds + 1):
            assert signals.first_late(waits, turn, 30.0) is None
            signals.post(pong, turn)

    thread = threading.Thread(target=answer)
    thread.start()
    waits = addresses([pong])
    for turn in range(1, rounds + 1):
        signals.post(ping, turn)
        assert signals.first_late(waits, turn, 30.0) is None
    thread.join()


# - Where memory comes from, and where it goes


def blocks_of(memory: Arena) -> int:
    return os.stat(f"/proc/self/fd/{memory.name.descriptor}").st_blocks * 512


def test_memory_is_zero_and_comes_back() -> None:
    memory = Arena()
    first = memory.take(10_000).view(torch.int32)
    assert first.numel() == 2500 and not first.any() and memory.offset_of(first) == 0
    first.fill_(7)
    assert blocks_of(memory) >= 10_000
    part = first[5:]
    del first
    gc.collect()
    assert part[0] == 7 and blocks_of(memory) >= 10_000  # a view keeps it
    del part
    gc.collect()
    assert blocks_of(memory) == 0
    again = memory.take(9_000)
    assert memory.offset_of(again) == 0 and not again.any()
    assert memory.offset_of(torch.zeros(4)) is None


def test_a_peer_sees_what_is_written() -> None:
    memory = Arena()
    own = memory.take(4096).view(torch.float32)
    own.copy_(torch.arange(1024.0))
    peer = arena.open_peer(memory.name)
    seen = peer.tensor(40, 3, torch.float32)
    assert seen.tolist() == [10.0, 11.0, 12.0]
    own[11] = -1.0
    assert seen.tolist() == [10.0, -1.0, 12.0]
    with pytest.raises(OSError, match="another one"):
        arena.open_peer(memory.name._replace(inode=1))
    memory.hide()


def test_a_forked_child_has_a_copy() -> None:
    """It neither sees what the parent writes later, nor writes to the parent."""
    code = """
import os, torch
from belief_dist.host_memory import Arena
memory = Arena()
own = memory.take(1 << 20).view(torch.float32)
own.fill_(1.0)
reads, writes = os.pipe()
child = os.fork()
if child == 0:
    os.read(reads, 1)  # until the parent has written
    own[1] = 9.0
    os._exit(0 if own[0] == 1.0 and own[-1] == 1.0 else 1)
own.fill_(2.0)
os.write(writes, b"x")
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, "the child saw a change"
assert own[1] == 2.0, "the child changed the parent's"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# - Who shares


def meet_all(count: int, change: Callable[[int, Any], Any]) -> list[Any]:
    """Let ranks meet that are threads here; `change` makes them look like something else."""
    barrier = threading.Barrier(count)
    said: list[Any] = [None] * count
    teams: list[Any] = [None] * count

    def run(rank: int) -> None:
        def exchange(value: Any) -> list[Any]:
            said[rank] = change(rank, value)
            barrier.wait(60)
            values = list(said)
            barrier.wait(60)
            return values

        teams[rank] = meet(rank, exchange, may_share=True)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return teams


def test_threads_of_one_process_do_not_share() -> None:
    assert meet_all(3, lambda rank, value: value) == [None] * 3


def test_all_do_without_if_one_cannot(caplog: pytest.LogCaptureFixture) -> None:
    def change(rank: int, value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        # Rank 2 is of another PID namespace: what it names is another process here.
        file = value.file._replace(process=1000 + rank, inode=1 if rank == 2 else 2)
        return value._replace(file=file)

    assert meet_all(3, change) == [None] * 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("ranks of one host send messages, and share no memory: rank ")


@pytest.mark.parametrize(
    "refusal", [OSError(38, "not implemented"), AttributeError("memfd_create")]
)
def test_systems_without_such_files(
    refusal: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> int:
        raise refusal

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert meet_all(2, lambda rank, value: value) == [None, None]
    assert "rank 0: " in caplog.text


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> Signals:
        raise Unavailable("there is no C++ compiler")

    monkeypatch.setattr(team, "signals", refuse)
    assert meet_all(2, lambda rank, value: value) == [None, None]
    assert "there is no C++ compiler" in caplog.text


def test_an_address_limit_is_an_obstacle_and_no_crash() -> None:
    code = """
import resource
from belief_dist.host_memory import meet
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
print(meet(0, lambda value: [value, value], may_share=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "None", done.stderr
    assert "share no memory" in done.stderr


def test_addresses_are_pointers() -> None:
    assert list(addresses([64, 128])) == [64, 128]
    assert ctypes.sizeof(addresses([64, 128])) == 2 * ctypes.sizeof(ctypes.c_void_p)
