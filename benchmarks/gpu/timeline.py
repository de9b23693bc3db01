"""`python -m benchmarks.gpu.timeline --out FILE.png`: what a GPU does in one training step.

From torch's profiler: each stream is a row, and colours tell what a kernel is for. As rank 0 of 8,
with a copy in the place of each collective, so that reductions have a stream of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.cases import SIZES
from benchmarks.gpu.contenders import sharded
from benchmarks.gpu.one_of_eight import alone

_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
# The first that a kernel's name contains.
_KINDS = {
    "update": ("update_many", "update_flat"),
    "sum and norm": ("reduce",),
    "checksum": ("checksums",),
    "gradients into their bucket": ("foreach", "multi_tensor"),
    "copies for collectives": ("Memcpy", "bitwise_or", "BitwiseOr"),
}
_OTHER = "forward and backward"


class Run(NamedTuple):
    """Something that ran on the GPU; times in milliseconds."""

    stream: int
    start: float
    duration: float
    kind: str


def kind_of(name: str) -> str:
    for kind, parts in _KINDS.items():
        # torch's own reductions have "reduce" inside longer names; ours is the whole name.
        if any(name == part if part == "reduce" else part in name for part in parts):
            return kind
    return _OTHER


def runs_of(events: Iterable[dict[str, Any]]) -> list[Run]:
    """Return what a trace of the profiler says about the GPU, from its first event on."""
    found = [each for each in events if each.get("cat") in _ON_GPU]
    if not found:
        raise ValueError("the trace has nothing that ran on a GPU")
    first = min(each["ts"] for each in found)
    return [
        Run(
            int(each["args"].get("stream", 0)),
            (each["ts"] - first) / 1e3,
            each["dur"] / 1e3,
            kind_of(each["name"]),
        )
        for each in found
    ]


def draw(runs: Sequence[Run], title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    streams = sorted({run.stream for run in runs})
    kinds = [_OTHER, *_KINDS]
    figure, axes = plt.subplots(figsize=(11, 0.9 * len(streams) + 1.6))
    for number, kind in enumerate(kinds):
        for row, stream in enumerate(streams):
            bars = [(r.start, r.duration) for r in runs if (r.stream, r.kind) == (stream, kind)]
            axes.broken_barh(
                bars, (row - 0.4, 0.8), color=f"C{number}", label=kind if not row else None
            )
    axes.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
    axes.set_xlabel("ms")
    axes.set_title(title)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3, frameon=False)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


def record(batch: int) -> list[Run]:
    """Return what the third step of a 303 M model did on the GPU."""
    size = SIZES["full"]
    tokens = size.step._replace(batch=batch).tokens("cuda")
    model = size.step.model(torch.bfloat16, "cuda")
    with alone():
        contender = sharded(model, "cuda")
    for _ in range(3):
        contender.iterate(tokens)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        contender.iterate(tokens)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return runs_of(json.loads(trace.read_text())["traceEvents"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.timeline")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32)
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu.timeline needs a CUDA GPU; torch sees none.", file=sys.stderr)
        return 2
    title = f"One step of 303 M parameters as rank 0 of 8, {torch.cuda.get_device_name()}"
    draw(record(chosen.batch), title, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
