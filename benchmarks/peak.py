"""How much memory one update needs beyond what it updates."""

from __future__ import annotations

from pathlib import Path

import torch

from belief_dist import AdaBelief


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def extra_bytes(elements: int) -> int:
    """Return by how much resident memory grows in a step, at its peak."""
    param = torch.ones(elements).requires_grad_()
    param.grad = torch.full_like(param, 1e-3)
    optimizer = AdaBelief([param])
    optimizer.step()  # makes the states
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before = _status("VmRSS")
    optimizer.step()
    return _status("VmHWM") - before


def peak_line(elements: int) -> str:
    """Return what was measured in one sentence."""
    extra = extra_bytes(elements)
    return (
        f"One update of {elements / 2**20:g} Mi float32 parameters ({16 * elements / 2**30:.1f} "
        f"GiB with gradients and states) needs {extra / 2**20:.2f} MiB more at its peak."
    )
