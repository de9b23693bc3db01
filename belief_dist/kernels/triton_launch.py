"""Launch the Triton kernels on the memory of tensors.

The host never waits for the device. Values that it does not know (a clipping factor, whether to
skip the step, and in a captured graph also the step and the learning rate) are read by the kernels.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from belief_dist.async_device import upload
from belief_dist.device_scalars import DeviceScalars
from belief_dist.kernels.build import Unavailable
from belief_dist.kernels.triton_reduce_launch import TritonReductions
from belief_dist.operands import BLOCK, FixedOperands, Operands
from belief_dist.options import DEFAULTS
from belief_dist.rule import Direction, StepScalars, step_scalars
from belief_dist.state_formats import update_stored_reference_

OLDEST = (3, 4)  # of Triton; 3.3 refuses a tuple in which a pointer is None
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STATES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8)
_TENSORS = 10  # the leading fields of Operands
_TABLES = 64  # number of tables kept on the device, one for each list of tensors
_VALUES = (
    "weight1", "beta2", "weight2", "eps", "decay", "coupled_decay", "step_size", "denom_scale"
)  # fmt: skip

# Placeholders for the scalars that the kernel reads from the device; the sign is a factor there.
_UNKNOWN = StepScalars._make([0.0] * 8 + [Direction.ADAPTIVE, 1.0, 0])

_Row = tuple[int, ...]


class _Table(NamedTuple):
    """The arguments of `update_many` on the device, and whether its addresses are aligned."""

    segments: Tensor  # (segments, 13), int64
    chunks: Tensor  # (chunks,), int64
    aligned: bool


class TritonKernel:
    """The functions of `triton_kernel.py`, on contiguous tensors of a GPU.

    With TRITON_INTERPRET=1, which Triton reads when it is imported, they work on CPU tensors.

    Raises:
        Unavailable: Triton does not work here.
    """

    def __init__(self) -> None:
        self.interprets = os.environ.get("TRITON_INTERPRET", "0") == "1"
        if not self.interprets and not torch.cuda.is_available():
            raise Unavailable("torch sees no GPU")
        try:
            import triton
            from triton import language as tl

            from belief_dist.kernels import triton_kernel

            self.reductions = TritonReductions(interprets=self.interprets)
        except Exception as error:  # a broken installation can raise anything
            raise Unavailable(f"triton cannot be imported ({_one_line(error)})") from error
        if triton_kernel.VERSION < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise Unavailable(f"Triton {triton.__version__} is too old: it takes {oldest} or newer")
        self._kernel = triton_kernel
        self._dtypes = {
            torch.float32: tl.float32,
            torch.float64: tl.float64,
            torch.bfloat16: tl.bfloat16,
            torch.float16: tl.float16,
            torch.uint8: tl.uint8,
            torch.int16: tl.int16,
        }
        self._tables: OrderedDict[tuple[Any, ...], _Table] = OrderedDict()
        self._captured: list[_Table] = []
        self._options: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": False}
        where = "in its interpreter"
        if not self.interprets:
            warp = torch.cuda.get_device_properties(torch.cuda.current_device()).warp_size
            self._options["num_warps"] = triton_kernel.THREADS // warp
            where = f"on {torch.cuda.get_device_name()}"
            self._check()
        self.description = f"Triton {triton.__version__}, {where}"

    def _check(self) -> None:
        """Compare a small update with the reference, which tests compiler, driver and bits."""
        tensors = torch.rand(4, 300, generator=torch.Generator().manual_seed(0))
        here, there = tensors.clone(), tensors.to("cuda")
        scalars = step_scalars({**DEFAULTS, "weight_decay": 0.1}, 3)
        try:
            self.update_([Operands(*there)], scalars)
            update_stored_reference_(Operands(*here), scalars)
            same = torch.equal(here, there.cpu())
        except Exception as error:
            raise Unavailable(f"a first launch failed ({_one_line(error)})") from error
        if not same:
            raise Unavailable("a first update has other bits than the reference")

    def serves(self, device: torch.device) -> bool:
        """Return whether the kernels work on tensors of this device."""
        return device.type == ("cpu" if self.interprets else "cuda")

    def updates(self, work: Sequence[Operands]) -> bool:
        """Return whether `update_` supports these tensors."""
        first = work[0]
        state = first.exp_avg.dtype
        return (
            all(
                self.serves(tensor.device) and tensor.is_contiguous()
                for operands in work
                for tensor in operands[:_TENSORS]
                if isinstance(tensor, Tensor)
            )
            and first.param.dtype in _FLOATS
            and first.grad.dtype in _FLOATS
            and state in _STATES
            and (first.param_out is None or first.param_out.dtype in _FLOATS)
            and (state == torch.uint8) == (first.exp_avg_exponent is not None)
            and (state != torch.uint8 or all(each.first % BLOCK == 0 for each in work))
        )

    def update_(
        self,
        work: Sequence[Operands],
        scalars: StepScalars | DeviceScalars,
        *,
        grad_scale: Tensor | float = 1.0,
        skip: Tensor | None = None,
    ) -> None:
        """Apply one step in a single launch for any number of tensors.

        Args:
            work: As for `kernels.update_`.
            scalars: From `rule.step_scalars`, or from `device_scalars`, so that a captured
                graph takes the step and the learning rate of its replay.
            grad_scale: As for `rule.update_reference_`.
            skip: One element on the tensors' device; if it is not zero, nothing is changed.
        """
        kept = work.kept if isinstance(work, FixedOperands) else None
        work = [operands for operands in work if operands.param.numel() > 0]
        if not work:
            return
        device = work[0].param.device
        wide = work[0].exp_avg.dtype == torch.float64
        values = self._values(scalars, grad_scale, skip, device, wide=wide)
        # Triton launches on the current device, which need not be the tensors'.
        on_device: AbstractContextManager[Any] = (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        )
        with on_device:
            table = None
            if len(work) > 1:
                table = None if kept is None else kept.get("triton")
                if table is None:
                    table = self._table([_row(each) for each in work], device)
                if kept is not None and table is not None:
                    kept["triton"] = table
            if table is None:
                for operands in work:
                    self._update_one(operands, values)
            else:
                self._update_many(work[0], table, values)

    def _values(
        self,
        scalars: StepScalars | DeviceScalars,
        grad_scale: Tensor | float,
        skip: Tensor | None,
        device: torch.device,
        *,
        wide: bool,
    ) -> dict[str, Any]:
        """Return the arguments that both kernels share.

        Triton passes Python floats as float32, so for `wide` arithmetic, in float64, they are
        passed in device memory.
        """
        if isinstance(grad_scale, Tensor) and grad_scale.device != device:
            grad_scale = float(grad_scale)
        if wide and not isinstance(grad_scale, Tensor):
            grad_scale = torch.full((), grad_scale, dtype=torch.float64, device=device)
        if wide and isinstance(scalars, StepScalars):
            listed = upload([float(x) for x in scalars], torch.float64, device)
            scalars = DeviceScalars(listed, scalars.coupled_decay != 0.0)
        known = scalars if isinstance(scalars, StepScalars) else _UNKNOWN
        factor = None if isinstance(grad_scale, Tensor) else float(grad_scale)
        return {
            "skip_at": skip,
            "grad_scale_at": grad_scale if factor is None else None,
            "scalars_at": scalars.values if isinstance(scalars, DeviceScalars) else None,
            **{name: float(getattr(known, name)) for name in _VALUES},
            "grad_scale": known.sign * (1.0 if factor is None else factor),
            "direction": int(known.direction),
            "step": _signed(known.step),
            "COUPLED": scalars.coupled
            if isinstance(scalars, DeviceScalars)
            else known.coupled_decay != 0.0,
            "TILE": self._kernel.TILE,
        }

    def _update_one(self, operands: Operands, values: dict[str, Any]) -> None:
        numel = operands.param.numel()
        self._kernel.update_flat[(-(-numel // self._kernel.TILE),)](
            *operands[:_TENSORS],
            numel=numel,
            key=_signed(operands.key),
            first=operands.first,
            **values,
            **self._options,
        )

    def _update_many(self, kind: Operands, table: _Table, values: dict[str, Any]) -> None:
        def dtype(tensor: Tensor | None) -> Any:
            return None if tensor is None else self._dtypes[tensor.dtype]

        self._kernel.update_many[(len(table.chunks) * self._kernel.CHUNK_TILES,)](
            table.segments,
            table.chunks,
            **values,
            PARAM=dtype(kind.param),
            GRAD=dtype(kind.grad),
            STATE=dtype(kind.exp_avg),
            MAX=dtype(kind.max_exp_avg_sq),
            OUT=dtype(kind.param_out),
            REMAINDER=dtype(kind.remainder),
            EXPONENT=dtype(kind.exp_avg_exponent),
            MAX_EXPONENT=dtype(kind.max_exp_avg_sq_exponent),
            ALIGNED=table.aligned,
            CHUNK_TILES=self._kernel.CHUNK_TILES,
            **self._options,
        )

    def _table(self, rows: Sequence[_Row], device: torch.device) -> _Table | None:
        """Return the segments and their chunks on the device, uploaded once for a list of tensors.

        Returns:
            None while a graph is captured, if these tensors have no table yet: the upload would
            become part of the graph, which would need the host memory on every replay.
        """
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        name = (device, stream, *rows)
        table = self._tables.get(name)
        if table is None:
            if capturing:
                return None
            table = self._upload(rows, device)
            self._tables[name] = table
            if len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(name)
        if capturing:  # kept for ever, as the graph holds its address
            self._captured.append(table)
        return table

    def _upload(self, rows: Sequence[_Row], device: torch.device) -> _Table:
        size = self._kernel.TILE * self._kernel.CHUNK_TILES
        counts = torch.tensor([-(-row[_TENSORS] // size) for row in rows])
        before = (counts.cumsum(0) - counts).repeat_interleave(counts)
        segment = torch.arange(len(rows)).repeat_interleave(counts)
        chunks = segment << 32 | torch.arange(len(before)) - before
        segments = torch.tensor(rows, dtype=torch.int64)
        # Exponents are read one by one and need no alignment.
        aligned = not (segments[:, : _TENSORS - 3] % 16).any()
        return _Table(segments.to(device), chunks.to(device), aligned)


def _signed(word: int) -> int:
    """Return 32 bits as a signed integer: Triton chooses an argument's type by its value."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _row(operands: Operands) -> _Row:
    tensors = operands[:_TENSORS]
    addresses = (t.data_ptr() if isinstance(t, Tensor) else 0 for t in tensors)
    return (*addresses, operands.param.numel(), operands.key, operands.first)


def _one_line(error: BaseException) -> str:
    """Return what is wrong. Triton shows much source and a caret first, or only names a cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    if "^" in lines:
        lines = lines[len(lines) - lines[::-1].index("^") :]
    said = " ".join(filter(None, lines))
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__
