"""What steps take: seconds of the host by phase, bytes that are sent, and memory."""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch

from belief_dist.memory_plan import bytes_on_wire
from belief_dist.optimizer import AdaBelief
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.hsdp import HybridShard
from belief_dist.sharding.schedule import Schedule

# Phases in which the host communicates, by where they are.
_COMMUNICATION = frozenset(
    f"{place}/{phase}"
    for place in ("backward", "step", "forward")
    for phase in ("reduce", "reduce_wait", "consensus", "gather", "gather_wait")
)


class StepTimes:
    """Seconds of this process for each step since it was asked before."""

    def __init__(self, optimizer: AdaBelief | ShardedAdaBelief) -> None:
        """Begin to measure the phases of `optimizer`."""
        if isinstance(optimizer, ShardedAdaBelief):
            self._phases = optimizer._engine.phases
            self._communicates = optimizer.comm.world_size > 1
        else:
            self._phases, self._communicates = optimizer._phases, False
        self._phases.start()
        self._before = self._phases.seconds()
        self._steps = self._phases.steps
        self._last: tuple[int, float] | None = None  # step and time of the last record

    def since_last(self, step: int) -> dict[str, float]:
        """Return the means over the steps since the last record, by name.

        Args:
            step: Number of the step.
        """
        found: dict[str, float] = {}
        now = time.monotonic()
        if self._last is not None and step > self._last[0]:
            found["time/seconds"] = now - self._last[1]
            found["time/seconds_per_step"] = (now - self._last[1]) / (step - self._last[0])
        self._last = step, now
        seconds, taken = self._phases.seconds(), self._phases.steps - self._steps
        if taken:
            each = {
                key: (value - self._before.get(key, 0.0)) / taken for key, value in seconds.items()
            }
            found |= {f"time/{key}": value for key, value in each.items()}
            if self._communicates:
                exposed = sum(value for key, value in each.items() if key in _COMMUNICATION)
                found["time/exposed_communication"] = exposed
        self._before, self._steps = seconds, self._phases.steps
        return found


class Traffic:
    """Bytes of gradients and parameters that this rank has sent for each step."""

    def __init__(self, optimizer: AdaBelief | ShardedAdaBelief) -> None:
        """Begin to count."""
        self._engine = optimizer._engine if isinstance(optimizer, ShardedAdaBelief) else None
        self._before = self._counted()

    def _counted(self) -> tuple[Schedule | None, int, int]:
        """Return who counts reductions, how many there were, and how many steps were begun."""
        if self._engine is None:
            return None, 0, 0
        schedule = self._engine.reducer.schedule
        return schedule, schedule.rounds, self._engine.consensus.calls

    def since_last(self) -> dict[str, int | float]:
        """Return the means over the steps since it was asked before, by name.

        Nothing on a mesh of two dimensions, where sums go in two stages, and where there is nobody
        to send to.
        """
        engine, before = self._engine, self._before
        self._before = schedule, reductions, steps = self._counted()
        if engine is None or steps == before[2] or engine.comm.world_size == 1:
            return {}
        if schedule is not before[0]:  # parameters came, and with them one that begins at zero
            return {}
        if any(isinstance(comm, HybridShard) for comm in engine.comms):
            return {}
        ranks = [comm.num_shards for comm in engine.comms]
        gradients, parameters = bytes_on_wire(engine.layout, ranks, engine.options)
        times = (reductions - before[1]) / (steps - before[2])
        return {"bytes_sent/gradients": times * gradients, "bytes_sent/parameters": parameters}


def memory_of_process(device: torch.device) -> dict[str, int]:
    """Return the memory that this process has, in bytes by name.

    Args:
        device: Of the parameters. Of a CUDA device, what torch's allocator has had at most.
    """
    found: dict[str, int] = {}
    status = Path("/proc/self/status")
    if status.exists():  # on Linux
        text = status.read_text()
        for key, name in (("VmRSS", "resident"), ("VmHWM", "resident_peak")):
            match = re.search(rf"^{key}:\s*(\d+) kB", text, re.MULTILINE)
            if match:
                found[f"memory/{name}"] = int(match[1]) * 1024
    if device.type == "cuda":
        found["memory/cuda_allocated_peak"] = torch.cuda.max_memory_allocated(device)
        found["memory/cuda_reserved_peak"] = torch.cuda.max_memory_reserved(device)
    return found
