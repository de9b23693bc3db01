"""A GAN on two ranks: each network with a ShardedAdaBelief of its own, the loop as for one process.

    torchrun --nproc-per-node 2 examples/gan.py --steps 200

A Wasserstein GAN with gradient penalty (Gulrajani et al., arXiv:1704.00028) on the 1,797 pictures
of digits, 8 x 8 pixels each, that ship with scikit-learn. It prints the critic's estimate of the
distance between real and generated pictures, which falls while training works.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn

import belief_dist
from belief_dist import ShardedAdaBelief

LATENT = 16


def network(inputs: int, outputs: int, last: nn.Module) -> nn.Module:
    return nn.Sequential(
        *[nn.Linear(inputs, 128), nn.LeakyReLU(0.2)],
        *[nn.Linear(128, 128), nn.LeakyReLU(0.2)],
        *[nn.Linear(128, outputs), last],
    )


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    share = torch.rand(len(real), 1, device=real.device)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return 10 * (slope.norm(dim=1) - 1).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of the generator")
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2), help="of ZeRO")
    parser.add_argument("--batch", type=int, default=64, help="pictures on each rank")
    args = parser.parse_args()

    world = belief_dist.distributed.init()
    device = world.device
    torch.manual_seed(0)
    pictures = torch.tensor(load_digits().images, dtype=torch.float32).view(-1, 64) / 8 - 1
    pictures = pictures.to(device)
    generator = network(LATENT, 64, nn.Tanh()).to(device)
    critic = network(64, 1, nn.Identity()).to(device)
    # The settings that the paper of AdaBelief has for this loss.
    options = {"lr": 2e-4, "betas": (0.5, 0.999), "eps": 1e-12, "stage": args.stage}
    train_generator = ShardedAdaBelief(generator.named_parameters(), **options)
    train_critic = ShardedAdaBelief(critic.named_parameters(), **options)
    torch.manual_seed(1 + world.rank)  # other pictures and noise on every rank

    for step in range(1, args.steps + 1):
        for _ in range(5):
            real = pictures[torch.randint(len(pictures), (args.batch,))]
            fake = generator(torch.randn(args.batch, LATENT, device=device)).detach()
            critic.zero_grad()
            # Two backward passes for one step, which add up.
            distance = critic(real).mean() - critic(fake).mean()
            (-distance).backward()
            gradient_penalty(critic, real, fake).backward()
            train_critic.step()
        generator.zero_grad()
        # This one leaves gradients in the critic, too; they are forgotten above.
        (-critic(generator(torch.randn(args.batch, LATENT, device=device))).mean()).backward()
        train_generator.step()
        if step % max(1, args.steps // 10) == 0:
            mean = distance.detach()
            dist.all_reduce(mean)
            if world.rank == 0:
                print(f"step {step}: distance {mean.item() / world.world_size:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
