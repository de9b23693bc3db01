"""GANs on Fashion-MNIST: Wasserstein, with gradient penalty, and with spectral normalization.

Sources: WGAN (arXiv:1701.07875), WGAN-GP (arXiv:1704.00028), SN-GAN (arXiv:1802.05957). How alike
pictures are is told by a Frechet distance as in arXiv:1706.08500, but in the features of a network
that this package trains itself: it is not FID, and compares with no published number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import Optimizer

from examples.evidence import pictures
from examples.evidence.images import Classify, fit
from examples.evidence.optimizers import build
from examples.evidence.ranks import on_ranks
from examples.evidence.study import Cell, Contender, Points, Study

LATENT = 32
BATCH = 32
CHANNELS = 8

Kind = Literal["WGAN", "WGAN-GP", "SN-GAN"]


@dataclass(frozen=True)
class Imitate:
    """What to train.

    Attributes:
        kind: Of GAN; the first two take five steps of the critic for one of the generator.
        steps: Of the generator.
        samples: Pictures to compare.
        ranks: Processes that share the batch; needs ShardedAdaBelief.
        points: How often to measure.
        judge_epochs: Of the training of the network whose features are compared.
        source: Of the pictures.
    """

    kind: Kind
    steps: int
    samples: int = 2000
    ranks: int = 1
    points: int = 1
    judge_epochs: int = 2
    source: pictures.Source = "fashion"


def generator() -> nn.Module:
    """Return a network from (n, LATENT) to (n, 1, 28, 28)."""
    wide = 2 * CHANNELS
    return nn.Sequential(
        *(nn.Linear(LATENT, wide * 49), nn.Unflatten(1, (wide, 7, 7))),
        *(nn.BatchNorm2d(wide), nn.ReLU()),
        nn.ConvTranspose2d(wide, CHANNELS, 4, 2, 1, bias=False),
        *(nn.BatchNorm2d(CHANNELS), nn.ReLU()),
        *(nn.ConvTranspose2d(CHANNELS, 1, 4, 2, 1), nn.Tanh()),
    )


def critic(kind: Kind) -> nn.Module:
    """Return a network from (n, 1, 28, 28) to (n, 1)."""
    layers: list[nn.Module] = [
        nn.Conv2d(1, CHANNELS, 4, 2, 1),
        nn.Conv2d(CHANNELS, 2 * CHANNELS, 4, 2, 1),
        nn.Linear(2 * CHANNELS * 49, 1),
    ]
    if kind == "SN-GAN":
        layers = [spectral_norm(layer) for layer in layers]
    first, second, last = layers
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), nn.Flatten(), last)


def imitate(work: Imitate, contender: Contender, lr: float, seed: int) -> Points:
    """Train a generator, and compare its pictures with those of the test set."""
    if contender.rule == "ShardedAdaBelief":
        return on_ranks(work.ranks, _imitate, work, contender, lr, seed)
    return _imitate(work, contender, lr, seed)


def _imitate(work: Imitate, contender: Contender, lr: float, seed: int) -> Points:
    return train(work, contender, lr, seed)[0]


def train(work: Imitate, contender: Contender, lr: float, seed: int) -> tuple[Points, nn.Module]:
    """Train; also return the generator."""
    real = pictures.load(work.source)[0].x
    torch.manual_seed(seed)
    artist, judge = generator(), critic(work.kind)
    train_artist = build(contender, artist.parameters(), lr)
    train_judge = build(contender, judge.parameters(), lr)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(1000 * (seed + 1) + rank)  # other pictures and noise on every rank
    batch = BATCH // work.ranks
    points: Points = []
    for step in range(1, work.steps + 1):
        for _ in range(1 if work.kind == "SN-GAN" else 5):
            with torch.no_grad():
                fake = artist(torch.randn(batch, LATENT))
            _improve_judge(work, judge, train_judge, real[torch.randint(len(real), (batch,))], fake)
        train_artist.zero_grad()
        (-judge(artist(torch.randn(batch, LATENT))).mean()).backward()
        train_artist.step()
        if step % max(1, work.steps // work.points) == 0 or step == work.steps:
            points.append({"step": step, **compare(work, artist)})
    return points, artist


def _improve_judge(
    work: Imitate, judge: nn.Module, optimizer: Optimizer, real: Tensor, fake: Tensor
) -> None:
    optimizer.zero_grad()
    if work.kind == "SN-GAN":
        loss = (1 - judge(real)).relu().mean() + (1 + judge(fake)).relu().mean()
    else:
        loss = judge(fake).mean() - judge(real).mean()
    if work.kind == "WGAN-GP":
        share = torch.rand(len(real), 1, 1, 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
        loss = loss + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
    loss.backward()
    optimizer.step()
    if work.kind == "WGAN":
        with torch.no_grad():
            for param in judge.parameters():
                param.clamp_(-0.01, 0.01)


@cache
def classifier(source: pictures.Source, epochs: int) -> nn.Sequential:
    """Return a trained network, always the same."""
    with torch.enable_grad(), torch.random.fork_rng():
        work = Classify("batch norm", epochs, every=epochs, source=source)
        net = fit(work, Contender("Adam", "Adam", (3e-3,)), 3e-3, seed=0)[1]
    assert isinstance(net, nn.Sequential)
    return net.eval()


@torch.no_grad()
def compare(work: Imitate, artist: nn.Module) -> dict[str, float]:
    """Return the Frechet distance to the test set, and how many classes are imitated.

    Returns:
        `frechet`, between the means of the last 32 channels; `classes`, of which at least one in a
        hundred generated pictures is; `entropy` of the classes, in nats.
    """
    judge = classifier(work.source, work.judge_epochs)
    real = pictures.load(work.source)[1].x[: work.samples]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same noise for all
        artist.eval()
        fake = torch.cat([artist(part) for part in torch.randn(len(real), LATENT).split(500)])
        artist.train()
    features = [_features(judge, x) for x in (real, fake)]
    share = judge(fake).argmax(1).bincount(minlength=10).double() / len(fake)
    return {
        "frechet": frechet(*features),
        "classes": (share >= 0.01).sum().item(),
        "entropy": -torch.special.xlogy(share, share).sum().item(),
    }


def _features(judge: nn.Sequential, x: Tensor) -> Tensor:
    convolutions = judge[:-2]  # without flattening and the last layer
    return torch.cat([convolutions(part).mean((2, 3)) for part in x.split(1000)]).double()


def frechet(real: Tensor, fake: Tensor) -> float:
    """Return the Frechet distance of two normal distributions with the samples' moments.

    Args:
        real: (n, features) float64.
        fake: (m, features) float64.
    """
    root = _root(real.t().cov())
    cross = torch.linalg.eigvalsh(root @ fake.t().cov() @ root).clamp_min(0).sqrt().sum()
    apart = (real.mean(0) - fake.mean(0)).square().sum()
    return (apart + real.var(0).sum() + fake.var(0).sum() - 2 * cross).item()


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.t()


_BETAS = {"betas": (0.5, 0.999)}
_LR = (1e-3,)  # not the paper's 2e-4, which is meant for much longer trainings
_SETTINGS: dict[Kind, tuple[int, dict[str, object]]] = {
    "WGAN": (120, {"eps": 1e-12}),
    "WGAN-GP": (70, {"eps": 1e-12}),
    "SN-GAN": (350, {"eps": 1e-16, "rectify": True}),
}
SHARDED = "ShardedAdaBelief, 2 ranks"


def _contenders(published: dict[str, object]) -> tuple[Contender, ...]:
    return (
        Contender("Adam", "Adam", _LR, _BETAS),
        Contender("RMSProp", "RMSprop", _LR),
        Contender("AdaBelief", "AdaBelief", _LR, {**_BETAS, **published}),
    )


GAN = Study(
    name="gan",
    question="Is AdaBelief steadier where two networks play against each other?",
    train=imitate,
    metrics=("frechet", "classes", "entropy"),
    score="frechet",
    maximize=False,
    minutes=4,
    cells=(
        *(
            Cell(kind, each, Imitate(kind, steps))
            for kind, (steps, published) in _SETTINGS.items()
            for each in _contenders(published)
        ),
        Cell(
            "WGAN-GP",
            Contender(SHARDED, "ShardedAdaBelief", _LR, {**_BETAS, **_SETTINGS["WGAN-GP"][1]}),
            replace(Imitate("WGAN-GP", _SETTINGS["WGAN-GP"][0]), ranks=2),
        ),
    ),
    seeds=3,
    quick={"steps": 1, "samples": 200, "points": 1, "judge_epochs": 1, "source": "digits"},
)
