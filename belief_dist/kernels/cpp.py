"""Call the compiled CPU kernel on the memory of tensors."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter

import torch
from torch import Tensor

from belief_dist.kernels.build import find_library
from belief_dist.norm import NUM_WORDS
from belief_dist.operands import BLOCK, Operands
from belief_dist.rule import StepScalars

_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_CODES = _NUMBERS | {torch.uint8: 4, torch.int16: 5, torch.int8: 6}

# The fields of Operands that are tensors; the last three have one element for each block.
_TENSORS = Operands._fields[:11]
_PER_BLOCK = 3
_KEY, _FIRST, _SUMS, _SCALARS = 11, 12, 13, 14
_dtype_of, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")

_Dtypes = tuple[torch.dtype | None, ...]


class CppKernel:
    """The functions of `cpu_kernel.cpp`, on contiguous CPU tensors.

    They run on torch's OpenMP threads and respect `torch.set_num_threads`.

    Raises:
        Unavailable: There is no compiled library, and it cannot be compiled.
    """

    def __init__(self) -> None:
        library, origin = find_library()
        size, code, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
        signatures = {
            "belief_update": [size, pointer, *[code] * 6, pointer, code],
            "belief_sum": [size, pointer, pointer, code, code, code, pointer, code],
            "belief_squares": [size, pointer, code, pointer, code],
            "belief_checksum": [size, pointer, size, code],
        }
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        library.belief_checksum.restype = ctypes.c_int64
        self._library = library
        library.belief_isa.restype = ctypes.c_char_p
        self.description = f"C++, {library.belief_isa().decode()}, {origin}"

    @staticmethod
    def supports(*tensors: Tensor | None) -> bool:
        """Return whether the library supports these tensors."""
        return all(
            tensor is None
            or (tensor.is_cpu and tensor.dtype in _NUMBERS and tensor.is_contiguous())
            for tensor in tensors
        )

    def update_(
        self,
        work: Sequence[Operands],
        scalars: Sequence[StepScalars],
        grad_scale: Tensor | float,
        skip: Tensor | None = None,
    ) -> bool:
        """Apply one step to all tensors in one call, unless `skip` is given and not zero.

        Returns:
            Whether the library supports these tensors; if not, nothing is changed.
        """
        dtypes = tuple(getattr(t, "dtype", None) for t in work[0][: len(_TENSORS)])
        codes = _codes(dtypes)
        table = None if codes is None else _table(work, dtypes)
        if codes is None or table is None:
            return False
        if skip is not None and bool(skip):
            return True
        factor = float(grad_scale)
        by_name = [number for each in scalars for number in _in_order(each, factor)]
        self._library.belief_update(
            len(work),
            table.buffer_info()[0],
            *codes,
            (ctypes.c_double * len(by_name))(*by_name),
            torch.get_num_threads(),
        )
        return True

    def ordered_sum_(
        self, out: Tensor, pieces: Sequence[Tensor], bins: Tensor | None, *, accumulate: bool
    ) -> None:
        """Add `pieces` in their order into `out`, and the squares of the sums to `bins`."""
        addresses = (ctypes.c_void_p * len(pieces))(*(piece.data_ptr() for piece in pieces))
        self._library.belief_sum(
            out.numel(),
            out.data_ptr(),
            addresses,
            _NUMBERS[pieces[0].dtype],
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
            _NUMBERS[values.dtype],
            bins.data_ptr(),
            torch.get_num_threads(),
        )

    def checksum(self, flat: Tensor, first: int) -> int:
        """Return what `eager.checksum` does."""
        words = flat.nbytes // 8
        total: int = self._library.belief_checksum(
            words, flat.data_ptr(), first, torch.get_num_threads()
        )
        return total


def _in_order(scalars: StepScalars, grad_scale: float) -> tuple[float, ...]:
    """Return what `Scalars` of the library is made from."""
    return (
        grad_scale * scalars.sign,
        scalars.coupled_decay,
        scalars.weight1,
        scalars.beta2,
        scalars.weight2,
        scalars.eps,
        scalars.decay,
        scalars.step_size,
        scalars.denom_scale,
        scalars.ema_weight,
        scalars.direction,
        scalars.step,
    )


@lru_cache(maxsize=256)
def _codes(dtypes: _Dtypes) -> tuple[int, ...] | None:
    """Return the codes of parameter, gradient, states, copy, remainder and average, or None.

    Args:
        dtypes: Dtypes of the tensors in `Operands`, None for those that are None.

    Returns:
        None if the library does not support them.
    """
    param, grad, m, s, largest, out, remainder, average, *exponents = dtypes
    if param == torch.float64:
        served = grad == m == param and out is remainder is None and average in (None, param)
    else:  # all computed in float32
        served = (
            {param, grad} <= {torch.float32, torch.bfloat16, torch.float16}
            and m in (torch.float32, torch.bfloat16, torch.uint8)
            and out in (None, torch.bfloat16, torch.float16)
            and (remainder is None or param == torch.bfloat16)
            and remainder in (None, torch.int16, torch.int8)
            and average in (None, torch.float32, torch.bfloat16)
        )
    blocks = [torch.uint8 if state == torch.uint8 else None for state in (m, s, largest)]
    if not served or s != m or largest not in (None, m) or exponents != blocks:
        return None
    assert param is not None and grad is not None and m is not None
    optional = (0 if each is None else _CODES[each] for each in (out, remainder, average))
    return _CODES[param], _CODES[grad], _CODES[m], *optional


def _table(work: Sequence[Operands], dtypes: _Dtypes) -> array[int] | None:
    """Return the rows (elements, *addresses, key, first, sums, scalars) of `Segment`, or None.

    The library is told dtypes and optional tensors of the first entry only. They must be those of
    all entries, or it would write outside of the tensors. The checks go field by field through
    `map`, whose loops in C are cheap for thousands of tensors.
    """
    columns = list(zip(*work, strict=True))
    sizes = list(map(Tensor.numel, columns[0]))
    rows, width = len(work), len(columns) + 1
    table = array("q", bytes(8 * rows * width))
    table[::width] = array("q", sizes)
    for field, dtype in enumerate(dtypes):
        column = columns[field]
        if dtype is None:
            if set(map(type, column)) != {type(None)}:
                return None
            continue
        if field == len(_TENSORS) - _PER_BLOCK:
            sizes = [-(-size // BLOCK) for size in sizes]
        if (
            type(None) in set(map(type, column))
            or list(map(_dtype_of, column)).count(dtype) != rows
            or not all(map(_is_cpu, column))
            or not all(map(Tensor.is_contiguous, column))
            or list(map(Tensor.numel, column)) != sizes
        ):
            return None
        table[field + 1 :: width] = array("q", map(Tensor.data_ptr, column))
    if torch.uint8 in dtypes and any(first % BLOCK for first in columns[_FIRST]):
        return None
    for field in (_KEY, _FIRST, _SCALARS):
        table[field + 1 :: width] = array("q", columns[field])
    if columns[_SUMS][0] is not None:
        table[_SUMS + 1 :: width] = array("q", map(Tensor.data_ptr, columns[_SUMS]))
    return table
