"""Trains a small GPT, sharded over all ranks: `train_gpt.py --help` lists the settings.

deepspeed --num_accelerators 2 examples/train_gpt.py --config configs/gpt.yaml
torchrun --nproc-per-node 2 examples/train_gpt.py --config configs/gpt.yaml
mpirun -n 2 python examples/train_gpt.py --config configs/gpt.yaml
srun --ntasks 2 python examples/train_gpt.py --config configs/gpt.yaml
python examples/train_gpt.py --config configs/gpt.yaml
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from jsonargparse import auto_cli

from belief_dist.checkpoint import CheckpointError
from belief_dist.distributed import LaunchError
from gpt.data import global_batch, load_corpus, unigram_entropy
from gpt.engines import Engine, ShardedEngine, build_engine
from gpt.evaluate import held_out_loss, sample
from gpt.job import (
    STOP,
    last_checkpoint,
    process_group,
    run_folder,
    with_stored_settings,
    write_checkpoint,
)
from gpt.model import GPT
from gpt.report import Log, draw_losses, print_table, progress_bar, unsharded_bytes
from gpt.settings import Settings
from gpt.stopping import StopRequest, agreed_signal

# A resumed run may differ in these alone.
_FREE = {
    *("stop_at", "out", "resume", "folder", "timeout"),
    *("prompt", "sample_bytes", "local_rank", "eval_every", "monitor_every"),
}


def main() -> None:
    try:
        settings = auto_cli(Settings, as_positional=False, args=with_stored_settings(sys.argv[1:]))
        with process_group(timedelta(seconds=settings.timeout)) as device:
            ended_by = train(settings, device)
        if ended_by is not None:
            sys.exit(128 + ended_by)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(
                "train_gpt.py: interrupted; --resume with the run's folder goes on from its last "
                "checkpoint, of which there is one every save_every steps",
                file=sys.stderr,
            )
        sys.exit(130)
    except LaunchError as error:
        # Not always of all ranks, and the environment may not tell which this is.
        print(f"train_gpt.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, CheckpointError) as error:
        # Every rank comes here with the same sentence.
        if os.environ.get("RANK", "0") == "0":
            print(f"train_gpt.py: {error}", file=sys.stderr)
        sys.exit(2)


def train(settings: Settings, device: torch.device) -> signal.Signals | None:
    """Train, and return the signal that has ended it before its last step, if one has."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    numbers, count = micro_batches(settings, rank, world_size)
    if settings.micro_batches is not None and device.type == "cpu":
        torch.set_num_threads(1)  # launchers give ranks more if they are fewer, which shows in bits
    run = run_folder(settings.out, settings.resume, settings.folder)
    corpus = load_corpus()
    unigram = unigram_entropy(corpus.held_out)

    torch.manual_seed(settings.seed)
    model = GPT(settings.layers, settings.width, settings.heads, settings.context)
    num_params = sum(p.numel() for p in model.parameters())
    engine = build_engine(model, settings, device)
    done = resume(engine, settings, run) if last_checkpoint(run) else 0
    if settings.monitor_every is not None:
        assert isinstance(engine, ShardedEngine)
        engine.watch(run / "metrics.jsonl", settings.monitor_every)
    request = StopRequest()
    request.listen()
    if rank == 0:
        print(
            f"{num_params:,} parameters, {world_size} {'rank' if world_size == 1 else 'ranks'} "
            f"on {device.type}, engine "
            f"{settings.engine}, {len(corpus.train):,} bytes of text, from step {done}, "
            f"writing to {run}"
        )
        log = Log(run / "log.jsonl", done)
        bar = progress_bar(done, settings.steps)

    ended_by = None
    last = min(settings.steps, settings.stop_at or settings.steps)
    for step in range(done + 1, last + 1):
        started = time.perf_counter()
        batch = global_batch(corpus.train, settings.batch, settings.context, settings.seed, step)
        parts = batch.to(device).chunk(count)
        losses = torch.zeros(count + 1, device=device)
        for k, loss in zip(numbers, engine.step([parts[k] for k in numbers]), strict=True):
            losses[k] = loss
        losses[count] = rank == 0 and (run / STOP).exists()
        told = torch.cat([losses, request.votes(device)])
        dist.all_reduce(told)
        losses, ended_by = told[: count + 1], agreed_signal(told[count + 1 :])
        row = {
            "step": step,
            "loss": losses[:count].mean().item(),
            "grad_norm": engine.grad_norm,
            "lr": engine.lr,
            "tokens_per_second": batch[:, 1:].numel() / (time.perf_counter() - started),
        }
        is_last = step == last or bool(losses[count])
        ended_by = None if is_last else ended_by
        if step % settings.eval_every == 0 or is_last:
            row["held_out_loss"] = held_out_loss(
                engine.model, corpus.held_out, settings.context, device
            )
        if rank == 0:
            log.add(row)
            bar.set_postfix_str(
                f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s, "
                f"lr {row['lr']:.1e}, grad norm {row['grad_norm']:.2f}",
                refresh=False,
            )
            bar.update()
        if step % settings.save_every == 0 or is_last or ended_by is not None:
            save(engine, settings, run, step)
        if is_last or ended_by is not None:
            break
    if rank == 0:
        bar.close()
    if ended_by is not None:  # whoever sends a signal does not wait long
        if rank == 0:
            draw_losses(log.rows, unigram, run / "loss.png")
            print(
                f"train_gpt.py: ended by {ended_by.name} after step {step}, which is saved; "
                f"--resume {run} goes on from there",
                file=sys.stderr,
            )
        return ended_by
    request.leave()

    fullest = torch.tensor(list(engine.bytes_per_rank().values()), device=device)
    dist.all_reduce(fullest, dist.ReduceOp.MAX)
    # On all ranks: at ZeRO-3 each forward gathers the parameters.
    text = sample(engine.model, settings.prompt, settings.sample_bytes, settings.context, device)
    if rank == 0:
        draw_losses(log.rows, unigram, run / "loss.png")
        print(f"\nA sample:\n{text}\n")
        unsharded = unsharded_bytes(num_params, getattr(torch, settings.dtype).itemsize)
        held = dict(zip(unsharded, fullest.tolist(), strict=True))
        print_table(held, unsharded, world_size, settings.engine)
        print(
            f"held-out loss {log.rows[-1]['held_out_loss']:.3f} nats per byte; unigram entropy of "
            f"the held-out text {unigram:.3f}\nlog, plot and checkpoint: {run}"
        )
    return None


def micro_batches(settings: Settings, rank: int, world_size: int) -> tuple[range, int]:
    """Return which micro-batches of a step are this rank's, and how many all ranks have."""
    if settings.micro_batches is not None:
        return range(rank, settings.micro_batches, world_size), settings.micro_batches
    own, count = settings.accumulate, world_size * settings.accumulate
    if settings.batch % count:
        raise ValueError(
            f"batch must be a multiple of ranks x accumulate ({world_size} x {own}), got "
            f"{settings.batch}."
        )
    return range(rank * own, (rank + 1) * own), count


def save(engine: Engine, settings: Settings, run: Path, step: int) -> None:
    """Write a checkpoint that `resume` continues from; all ranks."""

    def write(folder: Path) -> None:
        if dist.get_rank() == 0:
            kept = {k: v for k, v in asdict(settings).items() if k not in _FREE}
            (folder / "progress.json").write_text(
                json.dumps({"step": step, "settings": kept}, default=str, indent=1)
            )
        engine.save(folder)

    write_checkpoint(run, step, write)


def resume(engine: Engine, settings: Settings, run: Path) -> int:
    """Load the last checkpoint of a run and return its step; all ranks."""
    folder = last_checkpoint(run)
    assert folder is not None
    progress = json.loads((folder / "progress.json").read_text())
    here = json.loads(json.dumps(asdict(settings), default=str))
    for name, value in progress["settings"].items():
        if here[name] != value:
            raise ValueError(
                f"{name} is {here[name]!r} here, and the run in {run} has {value!r}; resume it "
                f"with the settings it was started with."
            )
    engine.load(folder)
    step: int = progress["step"]
    return step


if __name__ == "__main__":
    main()
