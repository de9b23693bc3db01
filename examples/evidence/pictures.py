"""Pictures to classify and to imitate: Fashion-MNIST complete, and digits where a moment counts.

Sources: Fashion-MNIST (Xiao et al., arXiv:1708.07747, MIT licence) as Debian packages it;
scikit-learn's digits (Alpaydin and Kaynak, UCI), which ship inside its wheels.
"""

from __future__ import annotations

import gzip
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.evidence.packages import file_of

Source = Literal["fashion", "digits"]
VALIDATION = 10_000  # the last ones of Fashion-MNIST's training pictures, for tuning


class Pictures(NamedTuple):
    """Pictures with their classes.

    Attributes:
        x: (n, 1, 28, 28) float32, from -1 to 1.
        y: (n,) int64, 0 to 9.
    """

    x: Tensor
    y: Tensor

    def take(self, chosen: slice | Tensor) -> Pictures:
        """Return some of them."""
        return Pictures(self.x[chosen], self.y[chosen])


@cache
def load(source: Source) -> tuple[Pictures, Pictures]:
    """Return what to train on, and what to test with."""
    if source == "digits":
        return _digits()
    return _fashion("train"), _fashion("t10k")


def _fashion(part: str) -> Pictures:
    tensors = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        path = f"usr/share/datasets/fashion-mnist/{part}-{kind}-ubyte.gz"
        file = file_of("dataset-fashion-mnist", path, "Fashion-MNIST")
        content = gzip.decompress(file.read_bytes())
        tensors.append(torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header))
    return Pictures(tensors[0].view(-1, 1, 28, 28).float() / 127.5 - 1, tensors[1].long())


def _digits() -> tuple[Pictures, Pictures]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    pictures = Pictures(F.interpolate(small, size=(28, 28)), torch.tensor(digits.target))
    return pictures.take(slice(0, 1500)), pictures.take(slice(1500, None))
