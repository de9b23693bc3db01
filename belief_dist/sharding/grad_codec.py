"""The form in which gradients travel: as they are, rounded to 16 bits, or in 8 bits.

A codec writes what a rank sends, and adds up what arrived. `codec_for` chooses it by the option
`reduce_dtype`; nothing else looks at the dtype of a message to tell what is in it.

**8 bits.** A block of 256 elements becomes one float32 scale and 256 signed bytes, 260 bytes in
all. What rounding has cut off stays on the rank that sends and is added to its next gradient (error
feedback), so that it is late and not lost. Blocks are anchored in their parameter: how a gradient
is rounded depends on nothing but that gradient.

    x = g + error;  scale = max|x| / 127;  q = round(x / scale);  error = x - q * scale

Sources: Seide et al., "1-Bit Stochastic Gradient Descent" (Interspeech 2014), section 3;
Karimireddy et al., "Error Feedback Fixes SignSGD", arXiv:1901.09847, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from belief_dist.kernels import encode_int8_, ordered_sum_, sum_int8_
from belief_dist.kernels.eager import CODE_BLOCK as BLOCK
from belief_dist.kernels.eager import CODE_BYTES as BLOCK_BYTES


class Codec:
    """Sends gradients as they are.

    Attributes:
        block: Elements that are encoded together: every parameter's start and every shard must be
            a multiple of it.
        unit: Elements of a message that hold one block.
        keeps_error: Whether `encode_` keeps what rounding has cut off.
    """

    block = 1
    unit = 1
    keeps_error = False

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of a message that carries gradients of `dtype`."""
        return dtype

    def wire_numel(self, numel: int) -> int:
        """Return how many elements of that dtype carry `numel` gradients."""
        return numel // self.block * self.unit

    def encode_(
        self, wire: Tensor, flat: Tensor, error: Tensor | None, idle: Sequence[Tensor]
    ) -> None:
        """Write the message for `flat`; not called where the dtype does not change.

        Args:
            wire: (wire_numel(n),) in the wire's dtype.
            flat: (n,), gradients.
            error: (n,) in the dtype of `flat`, updated in place, if the codec keeps errors.
            idle: The parts of `error` whose parameters have no gradient. They stay as they are and
                are not sent: if no rank uses such a parameter, what is sent for it is dropped.
        """
        wire.copy_(flat)

    def sum_(
        self, shard: Tensor, pieces: Sequence[Tensor], norm_bins: Tensor | None, *, accumulate: bool
    ) -> None:
        """Add messages in their order; the arguments are those of `kernels.ordered_sum_`."""
        ordered_sum_(shard, pieces, norm_bins, accumulate=accumulate)

    def window(self, start: int, stop: int) -> slice:
        """Return which gradients elements [start, stop) of a message carry; whole blocks."""
        return slice(start // self.unit * self.block, stop // self.unit * self.block)


class Cast(Codec):
    """Sends gradients rounded to nearest in another floating-point dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See `Codec.wire_dtype`."""
        return self._dtype


class Int8(Codec):
    """Sends gradients in 8 bits, with a scale for each block and error feedback."""

    block = BLOCK
    unit = BLOCK_BYTES
    keeps_error = True

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See `Codec.wire_dtype`; bytes of scales and of elements."""
        return torch.uint8

    def encode_(
        self, wire: Tensor, flat: Tensor, error: Tensor | None, idle: Sequence[Tensor]
    ) -> None:
        """See `Codec.encode_`."""
        assert error is not None
        kept = torch._foreach_mul(list(idle), 1.0) if idle else ()
        if idle:
            torch._foreach_zero_(list(idle))
        encode_int8_(wire, flat, error)
        if idle:
            torch._foreach_copy_(list(idle), list(kept))

    def sum_(
        self, shard: Tensor, pieces: Sequence[Tensor], norm_bins: Tensor | None, *, accumulate: bool
    ) -> None:
        """See `Codec.sum_`."""
        sum_int8_(shard, pieces, norm_bins, accumulate=accumulate)


AS_IS = Codec()


def codec_for(reduce_dtype: torch.dtype | None) -> Codec:
    """Return the codec that the option `reduce_dtype` asks for."""
    if reduce_dtype is None:
        return AS_IS
    return Int8() if reduce_dtype == torch.int8 else Cast(reduce_dtype)
