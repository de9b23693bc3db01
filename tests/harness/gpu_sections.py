"""Sections that go wrong in each way in which a GPU's can."""

from __future__ import annotations

import os
import signal
import time

from benchmarks.gpu.cases import SAME, Case, Outcome, Size


def _raise() -> Outcome:
    raise RuntimeError("a | pipe\nand a second line")


def _die() -> Outcome:
    print("these are its last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def _hang() -> Outcome:
    time.sleep(600)
    return {}


def cases(device: str, size: Size) -> list[Case]:
    return [
        Case("A table", "good", lambda: {"ms": 1.25, SAME: True, "device": device}),
        Case("A table", "missing", dict, ["no_such_package", "torch"]),
        Case("A table", "raises", _raise),
        Case("A table", "a peer raises", _raise, counts=False),
        Case("Another", "dies", _die),
        Case("Another", "hangs", _hang),
        Case("Another", "two rows", lambda: [{"name": "one"}, {"name": "two", SAME: False}]),
        Case("Another", "last", lambda: {"elements": size.elements}),
    ]
