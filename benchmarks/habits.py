"""What habits of training loops do under each way to shard: as one process, other, error, hang.

Two ranks train a small model for a few steps with a habit in the loop. One process that computes
the mean of the ranks' losses, with the plain optimizer and the same habit, says what is right.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.jobs import free_port, run_job

RANKS = 2
STEPS = 4
SECONDS = 25  # after which a case hangs
PEERS = ("ShardedAdaBelief", "stage=2", "DDP", "FSDP2", "DeepSpeed ZeRO-2")
# A large eps, so that the scale of a gradient shows in the step.
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-2, "weight_decay": 0.0}


class Net(nn.Module):
    """Three layers, of which one can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 1)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor, skip: bool = False, fail: bool = False) -> Tensor:
        x = x * self.scale
        for number, layer in enumerate(self.layers):
            if not (skip and number == 2):
                x = layer(x).tanh()
            if number == 1 and x.requires_grad:
                x = _Raise.apply(x, fail)
        loss: Tensor = self.head(x).square().mean()
        return loss


class _Raise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fail: bool) -> Tensor:
        ctx.fail = fail
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if ctx.fail:
            raise torch.OutOfMemoryError("out of memory")
        return grads[0], None


class Loop:
    """One way to train `Net`: alone, or as one of the peers on this rank."""

    def __init__(self, peer: str) -> None:
        torch.manual_seed(0)
        self.peer = peer
        self.bare = net = Net()
        self.engine: Any = None
        self.run: Callable[..., Any] = net
        if peer in ("ShardedAdaBelief", "stage=2"):
            from belief_dist import ShardedAdaBelief

            stage = 2 if peer == "stage=2" else 1
            self.optimizer: Any = ShardedAdaBelief(net.parameters(), stage=stage, **OPTIONS)
        elif peer == "DDP":
            self.run = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
            self.optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
        elif peer == "FSDP2":
            from torch.distributed.fsdp import fully_shard

            for layer in (*net.layers, net.head):
                fully_shard(layer)
            fully_shard(net)
            self.optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
        elif peer == "DeepSpeed ZeRO-2":
            import deepspeed

            config = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 1e6,  # 1.0 unless one says so
            }
            optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
            self.engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
            self.run, self.optimizer = self.engine, self.engine
        else:
            from belief_dist import AdaBelief

            kind = AdaBelief if peer == "alone, AdaBelief" else torch.optim.AdamW
            self.optimizer = kind(net.parameters(), **OPTIONS)
        self.is_alone = peer.startswith("alone")
        self.ranks = range(RANKS) if self.is_alone else [dist.get_rank()]

    def backward(self, step: int, micro: int = 0, **habit: Any) -> None:
        """Backward of the mean loss over the ranks; `skip` and `fail` name a rank."""
        for rank in self.ranks:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank + 10 * step + micro))
            flags = {name: which == rank for name, which in habit.items()}
            loss = self.run(x, **flags)
            if self.engine is not None:
                self.engine.backward(loss)
            else:
                (loss / len(self.ranks)).backward()
            if not self.is_alone and "skip" in habit:
                dist.all_reduce(loss.detach())  # the script logs it

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.optimizer.step()

    def params(self) -> list[nn.Parameter]:
        return list(self.bare.parameters())

    def weights(self) -> Tensor:
        if hasattr(self.optimizer, "wait_pending"):
            self.optimizer.wait_pending()
        whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in self.params()]
        return torch.cat([p.detach().flatten().float() for p in whole])


# - Habits: each trains some steps in its own way


def usual(loop: Loop, between: Callable[[], Any] = lambda: None) -> None:
    for step in range(STEPS):
        loop.zero_grad()
        loop.backward(step)
        between()
        loop.step()


def clips(loop: Loop) -> None:
    usual(loop, lambda: nn.utils.clip_grad_norm_(loop.params(), 0.05))


def scales(loop: Loop) -> None:
    usual(loop, lambda: [p.grad.mul_(0.5) for p in loop.params() if p.grad is not None])


def drops(loop: Loop) -> None:
    def drop() -> None:
        for param in loop.bare.head.parameters():
            param.grad = None

    usual(loop, drop)


def steps_twice(loop: Loop) -> None:
    usual(loop, loop.step)


def keeps_gradients(loop: Loop) -> None:
    for step in range(STEPS):
        loop.backward(step)
        loop.step()


def two_backwards(loop: Loop) -> None:
    for step in range(STEPS):
        loop.zero_grad()
        loop.backward(step)
        loop.backward(step, 5)
        loop.step()


def unused_layer(loop: Loop) -> None:
    for step in range(STEPS):
        loop.zero_grad()
        loop.backward(step, skip=0)
        loop.step()


def caught(loop: Loop) -> None:
    """Rank 1 runs out of memory in its second step, and takes the next batch; right is to go on."""
    for step in range(STEPS):
        loop.zero_grad()
        try:
            loop.backward(step, fail=1 if step == 1 and not loop.is_alone else -1)
        except torch.OutOfMemoryError:
            loop.zero_grad()
            continue
        loop.step()


def other_storage(loop: Loop) -> None:
    def assign() -> None:
        for param in loop.params():
            param.data = param.data.clone()

    usual(loop, assign)


def weights_clipped(loop: Loop) -> None:
    for step in range(STEPS):
        loop.zero_grad()
        loop.backward(step)
        loop.step()
        for param in loop.params():
            param.data.clamp_(-0.1, 0.1)


HABITS: dict[str, Callable[[Loop], None]] = {
    "nothing unusual": usual,
    "`clip_grad_norm_` after backward": clips,
    "`p.grad.mul_` after backward": scales,
    "`p.grad = None` for the last layer": drops,
    "`step()` twice on one gradient": steps_twice,
    "no `zero_grad` between steps": keeps_gradients,
    "two backward passes for a step": two_backwards,
    "a layer unused on one rank, its loss summed before `step`": unused_layer,
    "out of memory in backward, caught on one rank": caught,
    "`p.data = x`": other_storage,
    "`p.data.clamp_()`": weights_clipped,
}


def _case(peer: str, habit: str, reference: str) -> str:
    """Return what a habit does on this rank."""
    right = Loop(reference)
    HABITS[habit](right)
    loop = Loop(peer)
    try:
        HABITS[habit](loop)
        weights = loop.weights()
    except Exception as error:
        text = " ".join(str(error).split())
        return f"error: {type(error).__name__}: {text[:60]}"
    everyone = [torch.empty_like(weights) for _ in range(RANKS)]
    dist.all_gather(everyone, weights)
    if not all(torch.allclose(each, everyone[0], rtol=1e-5, atol=1e-7) for each in everyone):
        return "ranks differ"
    if HABITS[habit] is caught:
        return "goes on"
    start = Loop(reference).weights()
    off = (weights - right.weights()).norm() / (right.weights() - start).norm()
    return "as one process" if off < 1e-3 else f"other: {100 * off:.0f} % of the way off"


def _main(peer: str, habit: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with suppress(ImportError):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute to compile
    kind = "AdaBelief" if peer in PEERS[:2] else "AdamW"
    outcome = _case(peer, habit, f"alone, {kind}")
    Path(os.environ["HABIT_OUT"], str(dist.get_rank())).write_text(outcome)
    os._exit(0)


def run_habit(peer: str, habit: str) -> str:
    """Run one case in a job of its own, and return what came out, the worst of the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "HABIT_OUT": folder,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", RANKS]
        command += ["--master-port", free_port(), "-m", "benchmarks.habits", peer, habit]
        begin = time.monotonic()
        with suppress(Exception):
            run_job(command, Path.cwd(), environment, SECONDS)
        found = [path.read_text() for path in sorted(Path(folder).iterdir())]
        if len(found) < RANKS and time.monotonic() - begin > SECONDS - 1:
            return "; ".join(["hangs", *found])
        if len(found) < RANKS:
            return "; ".join(["a rank crashes", *found])
    return found[0] if len(set(found)) == 1 else "; ".join(found)


def table(outcomes: dict[str, dict[str, str]]) -> str:
    """Return a Markdown table: a row for each habit, a column for each peer."""
    lines = ["| habit | " + " | ".join(PEERS) + " |", "|---" * (len(PEERS) + 1) + "|"]
    for habit, row in outcomes.items():
        lines.append(f"| {habit} | " + " | ".join(row[peer] for peer in PEERS) + " |")
    return "\n".join(lines) + "\n"


def run_habits(habits: list[str], out: Path | None) -> str:
    """Run habits under all peers; return a table, and write the outcomes to `out` as JSON."""
    outcomes = {habit: {peer: run_habit(peer, habit) for peer in PEERS} for habit in habits}
    if out is not None:
        out.write_text(json.dumps(outcomes, indent=1) + "\n")
    return table(outcomes)


if __name__ == "__main__":
    _main(*sys.argv[1:])
