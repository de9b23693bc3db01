"""PyTorch Lightning: its DeepSpeedStrategy on GPUs, and DDP and FSDP2 anywhere.

    python examples/with_lightning.py --devices 2                    # DDP, on CPU too
    python examples/with_lightning.py --devices 2 --fsdp2            # FSDP2, on CPU too
    python examples/with_lightning.py --devices 8 --deepspeed configs/lightning_zero2.json

Lightning refuses DeepSpeed without CUDA, so the last line has not been run.
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import belief_dist
from gpt.data import load_corpus, windows
from gpt.model import GPT, next_byte_loss

CONTEXT = 64


class BytePredictor(pl.LightningModule):
    """The example's GPT with AdaBelief."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(layers=2, width=64, heads=4, context=CONTEXT)

    def configure_model(self) -> None:
        mesh = self.device_mesh  # of ModelParallelStrategy alone; Lightning calls this twice
        if mesh is not None and not isinstance(next(self.gpt.parameters()), DTensor):
            fully_shard(self.gpt, mesh=mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch = batch.long()
        loss = next_byte_loss(self.gpt(batch[:, :-1]), batch[:, 1:])
        self.log("loss", loss, sync_dist=True, prog_bar=True)
        return loss

    def on_train_start(self) -> None:
        self.print(belief_dist.verify(self.trainer))

    def configure_optimizers(self) -> belief_dist.AdaBelief:
        # Lightning ignores this where the DeepSpeed JSON names an optimizer.
        return belief_dist.AdaBelief(self.gpt.param_groups(), lr=2e-3, weight_decay=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deepspeed", help="its JSON; left out: DDP")
    parser.add_argument("--fsdp2", action="store_true", help="instead of DDP")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    pl.seed_everything(0)
    strategy = DDPStrategy()
    if args.deepspeed:
        strategy = DeepSpeedStrategy(config=args.deepspeed)
    elif args.fsdp2:
        strategy = ModelParallelStrategy(data_parallel_size=args.devices, tensor_parallel_size=1)
    trainer = pl.Trainer(
        accelerator="cuda" if args.deepspeed else "auto",
        strategy=strategy,
        devices=args.devices,
        max_steps=args.steps,
        logger=False,
        enable_checkpointing=False,
    )
    rows = windows(load_corpus().train, CONTEXT)
    trainer.fit(BytePredictor(), DataLoader(rows, batch_size=8, shuffle=True))
    if trainer.is_global_zero:
        print(f"loss {trainer.callback_metrics['loss'].item():.3f}", flush=True)


if __name__ == "__main__":
    main()
