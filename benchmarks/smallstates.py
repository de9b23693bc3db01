"""Whether smaller states train as well: the main job itself, in every mode, from several seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

_ROOT = Path(__file__).parent.parent
_POINTS = 10  # of a curve

_BF16 = ("--dtype=bfloat16",)
_REMAINDER = "--optimizer.master=remainder"
_BYTE = "--optimizer.state_dtype=uint8"
# The first one of a dtype is what the others are compared with.
MODES: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bf16 states": ("--optimizer.state_dtype=bfloat16",),
    "8-bit states": (_BYTE,),
    "bf16 model, float32 masters": _BF16,
    "bf16 model, remainders": (*_BF16, _REMAINDER),
    "bf16 model, remainders, 8-bit states": (*_BF16, _REMAINDER, _BYTE),
    "bf16 model, remainder8, 8-bit states": (*_BF16, f"{_REMAINDER}8", _BYTE),
}


@dataclass
class Runs:
    """One mode, from every seed."""

    dtype: str  # of the model
    held_out: list[list[float]]  # by seed, at every evaluation

    @property
    def losses(self) -> list[float]:
        """Return the last held-out loss of every seed."""
        return [losses[-1] for losses in self.held_out]

    @property
    def mean(self) -> float:
        """Return the mean of `losses`."""
        return mean(self.losses)

    @property
    def range(self) -> float:
        """Return the difference of the largest and the smallest of `losses`."""
        return max(self.losses) - min(self.losses)

    @property
    def deviation(self) -> float:
        """Return the standard deviation of `losses`, 0 where there is one."""
        return stdev(self.losses) if len(self.losses) > 1 else 0.0

    def curve(self) -> list[float]:
        """Return the mean over seeds at every evaluation."""
        return [mean(each) for each in zip(*self.held_out, strict=True)]

    def band(self) -> tuple[list[float], list[float]]:
        """Return the smallest and the largest over seeds at every evaluation."""
        each = list(zip(*self.held_out, strict=True))
        return [min(losses) for losses in each], [max(losses) for losses in each]


@dataclass
class Trained:
    """All modes."""

    settings: dict[str, Any]
    seeds: list[int]
    evaluated: list[int]  # steps
    modes: dict[str, Runs]

    def of(self, dtype: str) -> dict[str, Runs]:
        """Return the modes whose model has a dtype."""
        return {name: runs for name, runs in self.modes.items() if runs.dtype == dtype}

    def baseline(self, name: str) -> Runs | None:
        """Return the mode with float32 states and masters and the same model, if it was trained."""
        dtype = self.modes[name].dtype
        first = next(each for each in MODES if _dtype(MODES[each]) == dtype)
        return self.modes.get(first)


def train(
    names: Sequence[str], seeds: Sequence[int], steps: int, more: Sequence[str], processes: int
) -> Trained:
    """Train every mode from every seed, each in a process of its own with one thread.

    Args:
        names: Of `MODES`.
        seeds: Of weights, data and the noise that rounds.
        steps: Of each training.
        more: Further arguments of the main job.
        processes: That run at the same time.

    Raises:
        ValueError: There is no such mode.
        RuntimeError: A training failed; carries what it wrote.
    """
    for name in names:
        if name not in MODES:
            raise ValueError(f"there is no mode {name!r}, only: {'; '.join(MODES)}.")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        # Seed by seed, so that all modes meet what else the machine does.
        jobs = {
            (name, seed): pool.submit(
                _train_one, Path(folder) / f"{number}-{seed}", MODES[name], seed, steps, more
            )
            for seed in seeds
            for number, name in enumerate(names)
        }
        logs = {key: job.result() for key, job in jobs.items()}
    evaluated = [step for step, _ in next(iter(logs.values()))]
    modes = {
        name: Runs(_dtype(MODES[name]), [[loss for _, loss in logs[name, s]] for s in seeds])
        for name in names
    }
    settings = {"steps": steps, "seeds": len(seeds)}
    return Trained(settings, list(seeds), evaluated, modes)


def _dtype(arguments: Sequence[str]) -> str:
    return "bfloat16" if set(_BF16) <= set(arguments) else "float32"


def _train_one(
    out: Path, arguments: Sequence[str], seed: int, steps: int, more: Sequence[str]
) -> list[tuple[int, float]]:
    """Return the steps and losses of all evaluations."""
    command = [sys.executable, "examples/train_gpt.py", "--config=configs/gpt.yaml"]
    command += [f"--seed={seed}", f"--optimizer.seed={seed}", f"--steps={steps}"]
    command += [f"--warmup={steps // 10}", f"--eval_every={max(1, steps // _POINTS)}"]
    command += [f"--save_every={steps}", "--sample_bytes=1", f"--out={out}", *arguments, *more]
    done = subprocess.run(
        command,
        cwd=_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
