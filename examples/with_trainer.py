"""The Trainer of Hugging Face transformers: a small GPT-2 on bytes, through DeepSpeed's ZeRO-2.

    deepspeed --num_accelerators 2 examples/with_trainer.py

The model starts from random numbers and the text ships with Python, so nothing is downloaded.
Without DeepSpeed: `--deepspeed ""`, then the script's own AdaBelief trains under DDP.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from belief_dist import AdaBelief
from belief_dist.hf import VerifyCallback
from gpt.data import load_corpus, windows

CONFIG = Path(__file__).parent.parent / "configs" / "hf_zero2.json"
CONTEXT = 64


class Sequences:
    """A dataset of (context,) token sequences, each its own label."""

    def __init__(self, tokens: Tensor) -> None:
        self.rows = windows(tokens, CONTEXT - 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deepspeed", default=str(CONFIG), help="its JSON; empty for DDP")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="runs/trainer")
    parser.add_argument("--local_rank", type=int)  # the deepspeed launcher adds it
    args = parser.parse_args()

    configured = bool(args.deepspeed) and not torch.cuda.is_available()
    if configured:
        # Without a GPU Accelerate counts one process under DeepSpeed unless it is told the backend.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    set_seed(0)
    corpus = load_corpus()
    # TrainingArguments come before the model: they join the ranks and read the JSON.
    training = TrainingArguments(
        output_dir=args.output,
        deepspeed=args.deepspeed or None,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        accelerator_config={"use_configured_state": configured},
        use_cpu=not (args.deepspeed or torch.cuda.is_available()),
    )
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4)
    )
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=Sequences(corpus.train),
        eval_dataset=Sequences(corpus.held_out[: 200 * CONTEXT]),
        callbacks=[VerifyCallback()],
        # With an optimizer in the JSON that one trains, and this must not be passed.
        optimizer_cls_and_kwargs=None if args.deepspeed else (AdaBelief, {"lr": 2e-3}),
    )
    trainer.train()
    trainer.accelerator.print(f"held-out loss {trainer.evaluate()['eval_loss']:.3f} nats per byte")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
