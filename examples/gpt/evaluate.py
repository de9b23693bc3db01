"""What the model has learned: its loss on text it has not seen, and text of its own."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.data import windows
from gpt.model import next_byte_loss

_BATCH = 32
_TEMPERATURE = 0.8


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, text: Tensor, context: int, device: torch.device
) -> float:
    """Return the mean loss per byte over the whole text, in nats; all ranks share the work.

    Args:
        model: Maps (n, context) tokens to logits.
        text: (m,) uint8.
        context: Length of the windows that the text is cut into.
        device: Of the model.
    """
    mine = windows(text, context)[dist.get_rank() :: dist.get_world_size()]
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in mine.split(_BATCH):
        tokens = batch.to(device)
        loss = next_byte_loss(model(tokens[:, :-1]), tokens[:, 1:], "sum")
        total += torch.stack([loss.double(), torch.tensor(tokens[:, 1:].numel()).to(loss.device)])
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


@torch.no_grad()
def sample(
    model: torch.nn.Module, prompt: str, length: int, context: int, device: torch.device
) -> str:
    """Return `length` bytes that the model continues the prompt with, drawn by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    tokens = list(prompt.encode()) or [ord("\n")]
    for _ in range(length):
        seen = torch.tensor([tokens[-context:]], device=device)
        logits = model(seen)[0, -1].float().cpu() / _TEMPERATURE
        tokens.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
    return bytes(tokens).decode(errors="replace")
