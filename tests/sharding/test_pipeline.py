"""Two stages of a pipeline, two data-parallel ranks each: one norm, one verdict, tied weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from belief_dist import ShardedAdaBelief, checkpoint
from tests.harness.models import HYPER
from tests.harness.ranks import run_ranks
from tests.sharding.experts import RoundGrad

WORDS, WIDTH, MAX_NORM = 8, 6, 0.2


def rounded(x: Tensor) -> Tensor:
    """Return `x`, whose gradients are multiples of 2^-18: sums are exact, in any order."""
    found: Tensor = RoundGrad.apply(x, 1)
    return found


class Stages(nn.Module):
    """An embedding and a layer; a layer and the embedding once more, as the head."""

    def __init__(self, kept: Sequence[int] = (0, 1), seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(WORDS, WIDTH))
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
        self.layers = nn.ModuleDict({str(stage): layers[stage] for stage in kept})

    def _layer(self, stage: int, x: Tensor) -> Tensor:
        layer = self.layers[str(stage)]
        return nn.functional.linear(x, rounded(layer.weight), rounded(layer.bias)).tanh()

    def first(self, tokens: Tensor) -> Tensor:
        return self._layer(0, nn.functional.embedding(tokens, rounded(self.embed)))

    def last(self, x: Tensor, targets: Tensor) -> Tensor:
        scores = self._layer(1, x) @ rounded(self.embed).T
        return nn.functional.cross_entropy(scores, targets)


def batch_of(step: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + number)
    tokens = torch.randint(WORDS, (6,), generator=generator)
    return tokens[:-1], tokens[1:]


class Pipeline:
    """This rank's stage of a model and its optimizer."""

    def __init__(
        self, mesh: DeviceMesh, seed: int = 1, limit: float | None = None, **options: Any
    ) -> None:
        """With a limit, all but the tied weights have a norm of their own, over both stages."""
        self.stage, self.number = mesh.get_coordinate() or (0, 0)
        self.model = Stages([self.stage], seed)
        tied = [("embed", self.model.embed)]
        others = [each for each in self.model.named_parameters() if each[0] != "embed"]
        self.optimizer = ShardedAdaBelief(
            [
                {"params": tied, "process_group": dist.group.WORLD},
                {"params": others, "max_grad_norm": limit},
            ],
            process_group=mesh["dp"],
            model_parallel_group=mesh["pp"],
            bucket_bytes=100,
            **{"max_grad_norm": MAX_NORM, "overlap": False, **HYPER, **options},
        )
        group = mesh["pp"].get_group()
        self._peer = dist.get_process_group_ranks(group)[1 - self.stage]

    def step(self, step: int, factor: float = 1.0) -> None:
        tokens, targets = batch_of(step, self.number)
        if self.stage == 0:
            x = self.model.first(tokens)
            dist.send(x.detach(), self._peer)
            grad = torch.empty_like(x)
            dist.recv(grad, self._peer)
            x.backward(grad)
        else:
            x = torch.empty(len(tokens), WIDTH)
            dist.recv(x, self._peer)
            x.requires_grad_()
            (self.model.last(x, targets) * factor).backward()
            assert x.grad is not None
            dist.send(x.grad / factor, self._peer)
        self.optimizer.step()
        self.optimizer.zero_grad()


def whole_model(
    mesh: DeviceMesh, limit: float | None = None, **options: Any
) -> tuple[Stages, ShardedAdaBelief, Any]:
    """Return the model without stages on the data-parallel ranks alone, as a reference."""
    model = Stages()
    others = [each for each in model.named_parameters() if each[0] != "embed"]
    optimizer = ShardedAdaBelief(
        [{"params": [("embed", model.embed)]}, {"params": others, "max_grad_norm": limit}],
        process_group=mesh["dp"],
        **{"max_grad_norm": MAX_NORM, **HYPER, **options},
    )

    def step(number: int) -> None:
        tokens, targets = batch_of(number, mesh["dp"].get_local_rank())
        model.last(model.first(tokens), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def assert_equal(ours: Stages, theirs: Stages, context: Any) -> None:
    expected = dict(theirs.named_parameters())
    for name, param in ours.named_parameters():
        assert torch.equal(param, expected[name]), (context, name)


def norms_are_those_of_both_stages() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    pipeline = Pipeline(mesh, limit=MAX_NORM / 2)
    model, optimizer, step = whole_model(mesh, limit=MAX_NORM / 2)
    for number in range(2):
        pipeline.step(number)
        step(number)
        assert torch.equal(pipeline.optimizer.grad_norm, optimizer.grad_norm), number
        (norm,), (expected,) = (
            each.group_grad_norms.values() for each in (pipeline.optimizer, optimizer)
        )
        assert torch.equal(norm, expected) and norm > MAX_NORM / 2
        assert_equal(pipeline.model, model, number)
    with pytest.raises(ValueError, match="param groups with a norm of their own"):
        Pipeline(mesh, limit=MAX_NORM if mesh["pp"].get_local_rank() else None)


def trains_as_without_stages(folder: Path, **options: Any) -> None:
    shape = (2, dist.get_world_size() // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp"))
    pipeline = Pipeline(mesh, **options)
    model, optimizer, step = whole_model(mesh)
    for number in range(4):
        pipeline.step(number)
        step(number)
        assert torch.equal(pipeline.optimizer.grad_norm, optimizer.grad_norm), number
        assert optimizer.grad_norm > MAX_NORM
        assert_equal(pipeline.model, model, number)
    # One stage's gradient is not finite: both skip.
    pipeline.step(9, factor=float("inf"))
    assert pipeline.optimizer.skipped_steps == 1
    assert_equal(pipeline.model, model, "skipped")
    # Saved by stages, continued without; and the other way round.
    checkpoint.save(folder, 4, optimizer=pipeline.optimizer)
    other, its, other_step = whole_model(mesh)
    other.embed.data.fill_(1.0)
    checkpoint.load(folder, optimizer=its)
    for each in (step, other_step, pipeline.step):
        each(4)
    assert_equal(other, model, "loaded without stages")
    assert_equal(pipeline.model, model, "went on")
    checkpoint.save(folder / f"whole-{pipeline.stage}", 5, model=other, optimizer=its)
    cut = Pipeline(mesh, seed=3)
    checkpoint.load(folder / "whole-0", optimizer=cut.optimizer)
    cut.step(5)
    step(5)
    assert_equal(cut.model, model, "loaded by stages")


def refusals() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    for wrong, said in (
        (dist.group.WORLD, "no other of process_group"),
        (mesh["dp"], "no other of process_group"),
    ):
        with pytest.raises(ValueError, match=said):
            ShardedAdaBelief(
                Stages().parameters(), process_group=mesh["dp"], model_parallel_group=wrong
            )
    with pytest.raises(TypeError, match="must be a ProcessGroup"):
        ShardedAdaBelief(
            Stages().parameters(),
            process_group=mesh["dp"],
            model_parallel_group=[0, 2],  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match=r"ranks of other stages.*overlap=False and stage=1"):
        Pipeline(mesh, overlap=True)
    # What one stage alone has wrong is an error on the other, too.
    with pytest.raises(ValueError, match=r"ranks of other stages|overlap=False and stage=1"):
        Pipeline(mesh, stage=1 + mesh["pp"].get_local_rank())
    # Stages with other options come apart at once, not after weeks.
    with pytest.raises(ValueError, match="disagree about the option max_grad_norm"):
        Pipeline(mesh, max_grad_norm=1.0 + mesh["pp"].get_local_rank())


def test_one_rank_for_each_stage(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, partial(trains_as_without_stages, tmp_path / "shared"))


def test_pipeline(tmp_path: Path) -> None:
    run_ranks(
        4,
        tmp_path,
        partial(trains_as_without_stages, tmp_path / "shared"),
        partial(trains_as_without_stages, tmp_path / "sent", shared_memory=False),
        norms_are_those_of_both_stages,
        refusals,
    )
