"""What one step reads and writes: the tensors of a parameter, or of a part of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

# What is watched for flipped bits.
WATCHED_NAMES = ("master", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param_ema")
WATCHED = len(WATCHED_NAMES)

# Elements of one parameter that share a stored exponent, with uint8 states.
BLOCK = 256


class Operands(NamedTuple):
    """Everything that a step reads and writes of one parameter, or of a part of it.

    All tensors have equally many elements, n, except that each `*_exponent` is (ceil(n / 256),),
    and `sums`, which many operands can share.
    """

    param: Tensor  # float64, float32, bfloat16 or float16; in place
    grad: Tensor  # any of these dtypes; read only
    exp_avg: Tensor  # m: float32 (float64 for float64 parameters), bfloat16 or uint8; in place
    exp_avg_sq: Tensor  # s, in the dtype of m; in place
    max_exp_avg_sq: Tensor | None = None  # amsgrad: largest s so far, in the dtype of m; in place
    param_out: Tensor | None = None  # 16 bits: receives the rounded new parameter
    # int16: lower half of the masters, param being the upper one, bfloat16; int8: its upper byte
    remainder: Tensor | None = None  # in place
    param_ema: Tensor | None = None  # average of the parameter: as m, but never uint8; in place
    exp_avg_exponent: Tensor | None = None  # uint8, with uint8 states only; in place
    exp_avg_sq_exponent: Tensor | None = None  # likewise
    max_exp_avg_sq_exponent: Tensor | None = None  # likewise
    key: int = 0  # of the parameter, see `noise_key`; used where rounding is stochastic
    first: int = 0  # number of the first element in its parameter; with uint8, a multiple of 256
    # (slots, 2, WATCHED), int32: what `state_formats.word_sums` returns of everything that the
    # update reads is added to [:, 0], and of everything that it writes to [:, 1], in any slot. A
    # step that is skipped may leave anything there.
    sums: Tensor | None = None
    scalars: int = 0  # which of an update's scalars are its own, where there are several


class FixedOperands(list[Operands]):
    """Operands of one update whose tensors stay where they are, and which are not changed.

    Attributes:
        kept: What kernels derive from them, such as a table of their addresses, by any key.
    """

    def __init__(self, operands: Iterable[Operands]) -> None:
        super().__init__(operands)
        self.kept: dict[Any, Any] = {}


def cut(operands: Operands, start: int, stop: int) -> Operands:
    """Return the part with elements [start, stop) of 1-D operands, as views.

    With uint8 states `start` must be a multiple of `BLOCK`.
    """
    parts: dict[str, Any] = {}
    for name, value in operands._asdict().items():
        if isinstance(value, Tensor) and name != "sums":
            scale = BLOCK if name.endswith("_exponent") else 1
            parts[name] = value[start // scale : -(-stop // scale)]
    return operands._replace(**parts, first=operands.first + start)
