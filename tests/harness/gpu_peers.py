"""A section of which nothing counts that fails."""

from __future__ import annotations

from benchmarks.gpu.cases import Case, Outcome, Size


def _raise() -> Outcome:
    raise ValueError("not ours")


def cases(device: str, size: Size) -> list[Case]:
    return [
        Case("Peers", "good", lambda: {"ms": 2000.4}),
        Case("Peers", "a peer raises", _raise, counts=False),
    ]
