"""A plain DeepSpeed script, in the form of DeepSpeed's own examples: digits by a small CNN.

    deepspeed --num_accelerators 2 examples/with_deepspeed.py \
        --deepspeed --deepspeed_config configs/digits.json

The pictures, 8 x 8 pixels each, ship with scikit-learn.
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import belief_dist

HELD_OUT = 297  # of 1797


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--local_rank", type=int)  # the deepspeed launcher adds it
    args = deepspeed.add_config_arguments(parser).parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    model = make_model()
    # The optimizer is the one that the JSON names.
    engine, _, loader, _ = deepspeed.initialize(
        args=args,
        model=model,
        model_parameters=model.parameters(),
        training_data=TensorDataset(images[:-HELD_OUT], labels[:-HELD_OUT]),
    )
    if engine.global_rank == 0:
        print(belief_dist.verify(engine), flush=True)

    for epoch in range(args.epochs):
        loader.data_sampler.set_epoch(epoch)
        for batch, target in loader:
            output = engine(batch.to(engine.device))
            loss = nn.functional.cross_entropy(output, target.to(engine.device))
            engine.backward(loss)
            engine.step()
    engine.eval()
    with torch.no_grad():
        guess = engine(images[-HELD_OUT:].to(engine.device)).argmax(1).cpu()
    if engine.global_rank == 0:
        share = (guess == labels[-HELD_OUT:]).float().mean().item()
        print(f"{share:.1%} of {HELD_OUT} held-out digits are right", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
