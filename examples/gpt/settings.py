"""The settings of a run. The command line and --help are made from this class."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass
class Settings:
    """Train a small GPT on the text of Python's own documentation, on any number of ranks.

    Args:
        engine: "sharded" trains with belief_dist.ShardedAdaBelief, "deepspeed" with the engine
            that deepspeed_config describes.
        optimizer: Arguments of ShardedAdaBelief. The deepspeed engine takes them from its own file.
        deepspeed_config: DeepSpeed's JSON. This script fills in batch sizes and bf16.
        layers: Transformer blocks.
        width: Size of a token's vector.
        heads: Attention heads; must divide width into even parts.
        context: Length of a sequence in bytes, which are the tokens.
        dtype: Of parameters and gradients. With bfloat16 the optimizer keeps float32 masters.
        batch: Sequences per step, over all ranks.
        accumulate: Micro-batches that each rank splits its share into.
        micro_batches: Instead, micro-batches of a step over all ranks, whose number then changes no
            bit of the run (docs/any-world-size.md). It need not divide by the number of ranks.
        steps: Optimizer steps of the whole run.
        warmup: Steps in which the learning rate rises; afterwards it falls by a cosine to a tenth.
        seed: Of weights and data.
        eval_every: Steps between evaluations on the held-out text.
        monitor_every: Steps between records of what the optimizer does, in metrics.jsonl of the
            run's folder (docs/telemetry.md). None writes none. Needs engine=sharded.
        save_every: Steps between checkpoints. The last step is always saved.
        stop_at: End after this step, saved, as if the job's time were over.
        out: Folder of the run; default: a new one under runs/.
        resume: Folder of a run to continue from its last checkpoint.
        folder: Of a run to start, or to continue if it has a checkpoint: one command for both,
            as launchers that restart a job need it.
        timeout: Seconds after which a rank that does not answer ends the job.
        prompt: What the sample begins with.
        sample_bytes: Length of the sample.
        local_rank: Ignored; the deepspeed launcher passes it.
    """

    engine: Literal["sharded", "deepspeed"] = "sharded"
    optimizer: dict[str, Any] = field(default_factory=dict)
    deepspeed_config: Path | None = None
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch: int = 32
    accumulate: int = 1
    micro_batches: int | None = None
    steps: int = 500
    warmup: int = 50
    seed: int = 1
    eval_every: int = 100
    monitor_every: int | None = None
    save_every: int = 250
    stop_at: int | None = None
    out: Path | None = None
    resume: Path | None = None
    folder: Path | None = None
    timeout: float = 300
    prompt: str = "The "
    sample_bytes: int = 300
    local_rank: int = -1

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "context", "batch", "accumulate", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if "micro_batches" in self.optimizer:
            raise ValueError(
                "micro_batches is a setting of the run, which deals the data by it: pass "
                "--micro_batches, and leave --optimizer.micro_batches out."
            )
        if self.micro_batches is not None:
            self._check_micro_batches(self.micro_batches)
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of twice the heads, got width {self.width} and "
                f"{self.heads} heads."
            )
        if self.stop_at is not None and self.stop_at < 1:
            raise ValueError(f"stop_at must be at least 1, got {self.stop_at}.")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup must be in 0..steps ({self.steps}), got {self.warmup}.")
        if (self.engine == "deepspeed") != (self.deepspeed_config is not None):
            raise ValueError(
                "engine=deepspeed and deepspeed_config go together: for example --engine deepspeed "
                "--deepspeed_config configs/deepspeed_zero1.json."
            )
        if sum(path is not None for path in (self.out, self.resume, self.folder)) > 1:
            raise ValueError(
                "out starts a run, resume continues one, folder does either: give only one of them."
            )
        every = self.monitor_every
        if every is not None and (every < 1 or self.engine != "sharded"):
            raise ValueError(
                f"monitor_every must be at least 1 and needs engine=sharded, got {every} with "
                f"engine={self.engine}."
            )
        if self.timeout <= 0:
            raise ValueError(f"timeout must be positive, got {self.timeout}.")
        if self.deepspeed_config is not None:
            self._refuse_other_wishes(self.deepspeed_config)

    def _check_micro_batches(self, count: int) -> None:
        if count < 1 or self.batch % count:
            raise ValueError(
                f"batch must be a multiple of micro_batches, which is at least 1, got batch "
                f"{self.batch} and micro_batches {count}."
            )
        if self.accumulate > 1 or self.engine != "sharded":
            raise ValueError(
                "micro_batches takes the place of accumulate, and needs engine=sharded: leave "
                "accumulate out."
            )

    def _refuse_other_wishes(self, path: Path) -> None:
        """Refuse a DeepSpeed JSON that asks for something that these settings would overwrite."""
        try:
            asked = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"deepspeed_config {path} cannot be read: {error}.") from error
        wishes = {
            "batch": (asked.get("train_batch_size", "auto"), self.batch),
            "accumulate": (asked.get("gradient_accumulation_steps", "auto"), self.accumulate),
            "dtype": (
                {True: "bfloat16", False: "float32"}.get(
                    asked.get("bf16", {}).get("enabled", "auto"), "auto"
                ),
                self.dtype,
            ),
        }
        for name, (wish, value) in wishes.items():
            if wish not in ("auto", value):
                raise ValueError(
                    f"{name} is {value} here, and {path} asks for {wish}: pass --{name} {wish}, or "
                    f"leave it out of the file."
                )
