"""The text: the language reference that ships inside every CPython, so nothing is downloaded.

Source: the module `pydoc_data.topics`, generated from the documentation of Python.
Licence: Python Software Foundation License Version 2, https://docs.python.org/3/license.html
Other Python versions ship another edition: the SHA-256 that a run prints tells which one it was.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

HELD_OUT = 0.1  # of the text, its end


@dataclass(frozen=True)
class Corpus:
    """A text in two parts, as bytes.

    Attributes:
        train: (n,) uint8, the first nine tenths.
        held_out: (m,) uint8, the rest.
        sha256: Of the whole text.
    """

    train: Tensor
    held_out: Tensor
    sha256: str


def load_corpus() -> Corpus:
    """Return the topics in alphabetical order, without repetitions.

    Topics quote one another at length. Every paragraph is kept only where it occurs first, so that
    nothing of the held-out end has been seen in training.
    """
    paragraphs = (p for name in sorted(topics) for p in topics[name].split("\n\n"))
    text = "\n\n".join(dict.fromkeys(paragraphs)).encode()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = round(len(text) * (1 - HELD_OUT))
    return Corpus(tokens[:cut], tokens[cut:], hashlib.sha256(text).hexdigest())


def unigram_entropy(tokens: Tensor) -> float:
    """Return the entropy of single bytes, in nats: no model without context can do better."""
    share = tokens.long().bincount().double() / tokens.numel()
    return -torch.special.xlogy(share, share).sum().item()


UNIFORM_ENTROPY = math.log(256)  # a model that knows nothing at all


def global_batch(tokens: Tensor, size: int, context: int, seed: int, step: int) -> Tensor:
    """Return the sequences of one step for all ranks: (size, context + 1), int64.

    They depend on nothing but the arguments. So the position in the data is the step itself, and
    any number of ranks trains on the same sequences.
    """
    # torch's CPU generator takes 32 bits of a seed.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)
    starts = torch.randint(tokens.numel() - context, (size, 1), generator=generator)
    return tokens[starts + torch.arange(context + 1)].long()


def windows(tokens: Tensor, context: int) -> Tensor:
    """Cut a text into consecutive windows of (count, context + 1), int64; a rest is left out.

    Neighbours share one byte: it is the last target of the one and the first input of the other.
    """
    return tokens.unfold(0, context + 1, context).long()
