"""Accelerate with DeepSpeed: its placeholder DummyOptim, and the optimizer named in the JSON.

    accelerate launch --use_deepspeed --deepspeed_config_file configs/accelerate_zero2.json \
        --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        examples/with_accelerate.py

`--real` passes an AdaBelief that the script built; then the JSON must not name an optimizer.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DummyOptim, InitProcessGroupKwargs, set_seed
from torch.utils.data import DataLoader

import belief_dist
from gpt.data import load_corpus, windows
from gpt.model import GPT, next_byte_loss

CONTEXT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", action="store_true", help="an optimizer instead of DummyOptim")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    # Without a GPU Accelerate counts one process under DeepSpeed, unless it is told the backend.
    gloo = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(kwargs_handlers=gloo)
    set_seed(0)
    model = GPT(layers=2, width=64, heads=4, context=CONTEXT)
    optimizer = (
        belief_dist.AdaBelief(model.param_groups(), lr=2e-3, weight_decay=0.1)
        if args.real
        # Only lr and weight_decay may be "auto" in the JSON: it takes them from here.
        else DummyOptim(model.param_groups(), lr=2e-3, weight_decay=0.1)
    )
    rows = windows(load_corpus().train, CONTEXT)
    loader = DataLoader(rows, batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.print(belief_dist.verify(accelerator))

    for step, batch in zip(range(args.steps), loader, strict=False):
        batch = batch.long()
        loss = next_byte_loss(model(batch[:, :-1]), batch[:, 1:])
        accelerator.backward(loss)  # with DeepSpeed this is the step, too
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            mean = accelerator.gather(loss.detach()).mean().item()
            accelerator.print(f"step {step + 1}: loss {mean:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
