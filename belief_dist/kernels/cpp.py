"""The compiled CPU kernel, called on the memory of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from belief_dist.kernels.build import find_library
from belief_dist.norm import NUM_WORDS
from belief_dist.rule import StepScalars, compute_dtype
from belief_dist.storage import Operands

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class CppKernel:
    """The functions of `cpu_kernel.cpp`, on contiguous CPU tensors.

    They run on torch's own OpenMP threads and so obey `torch.set_num_threads`.

    Raises:
        Unavailable: From the constructor: there is no compiled library here.
    """

    def __init__(self) -> None:
        library, origin = find_library()
        size, code, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
        signatures = {
            "belief_update": [
                size, *[pointer, code] * 2, *[pointer] * 4, code, pointer, code, code
            ],
            "belief_sum": [size, pointer, pointer, code, code, code, pointer, code],
            "belief_squares": [size, pointer, code, pointer, code],
        }  # fmt: skip
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library
        library.belief_isa.restype = ctypes.c_char_p
        self.description = f"C++, {library.belief_isa().decode()}, {origin}"

    @staticmethod
    def supports(*tensors: Tensor | None) -> bool:
        """Tell whether the library can work on these tensors."""
        return all(
            tensor is None
            or (tensor.device.type == "cpu" and tensor.dtype in _DTYPES and tensor.is_contiguous())
            for tensor in tensors
        )

    def updates(self, work: Sequence[Operands]) -> bool:
        """Tell whether `update_` serves these tensors."""
        first = work[0]
        return (
            all(self.supports(*(t for t in each if isinstance(t, Tensor))) for each in work)
            and first.exp_avg.dtype == compute_dtype(first.param.dtype)
            and first.exp_avg.dtype == compute_dtype(first.grad.dtype)
            and first.remainder is None
            and (
                first.param_out is None
                or (first.param_out.itemsize == 2 and first.exp_avg.itemsize == 4)
            )
        )

    def update_(self, work: Sequence[Operands], scalars: StepScalars, scale: float) -> None:
        """Apply one step in a single pass."""
        by_name = (
            scale * scalars.sign,
            scalars.coupled_decay,
            scalars.weight1,
            scalars.beta2,
            scalars.weight2,
            scalars.eps,
            scalars.decay,
            scalars.step_size,
            scalars.denom_scale,
        )
        for o in work:
            self._library.belief_update(
                o.param.numel(),
                o.param.data_ptr(),
                _DTYPES[o.param.dtype],
                o.grad.data_ptr(),
                _DTYPES[o.grad.dtype],
                o.exp_avg.data_ptr(),
                o.exp_avg_sq.data_ptr(),
                None if o.max_exp_avg_sq is None else o.max_exp_avg_sq.data_ptr(),
                None if o.param_out is None else o.param_out.data_ptr(),
                0 if o.param_out is None else _DTYPES[o.param_out.dtype],
                (ctypes.c_double * len(by_name))(*by_name),
                int(scalars.direction),
                torch.get_num_threads(),
            )

    def ordered_sum_(
        self, out: Tensor, pieces: Sequence[Tensor], bins: Tensor | None, *, accumulate: bool
    ) -> None:
        """Add `pieces` in their order into `out`, and the squares of the sums to `bins`."""
        addresses = (ctypes.c_void_p * len(pieces))(*(piece.data_ptr() for piece in pieces))
        self._library.belief_sum(
            out.numel(),
            out.data_ptr(),
            addresses,
            _DTYPES[pieces[0].dtype],
            len(pieces),
            accumulate,
            None if bins is None else bins.data_ptr(),
            torch.get_num_threads(),
        )

    def add_squares_(self, bins: Tensor, values: Tensor) -> None:
        """Add the squares of `values` to `bins`; see `norm.add_squares_`."""
        assert bins.numel() == NUM_WORDS and bins.dtype == torch.int64
        self._library.belief_squares(
            values.numel(),
            values.data_ptr(),
            _DTYPES[values.dtype],
            bins.data_ptr(),
            torch.get_num_threads(),
        )
