"""Launch the Triton kernels on the memory of tensors.

The host never waits for the device. Values that it does not know (a clipping factor, whether to
skip the step, and in a captured graph also the step and the learning rate) are read by the kernels.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from belief_dist.async_device import current, upload
from belief_dist.device_scalars import DeviceScalars, Scalars
from belief_dist.kernels.build import Unavailable, one_line
from belief_dist.kernels.eager import CODE_BLOCK
from belief_dist.kernels.triton_reduce_launch import TritonReductions
from belief_dist.kernels.triton_tables import Row, Table, Uploaded
from belief_dist.operands import BLOCK, FixedOperands, Operands
from belief_dist.options import DEFAULTS
from belief_dist.rule import Direction, StepScalars, step_scalars
from belief_dist.state_formats import update_stored_reference_

OLDEST = (3, 4)  # of Triton; 3.3 refuses a tuple in which a pointer is None
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STATES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8)
_TENSORS = 11  # the leading fields of Operands
_TABLES = 64  # number of tables kept on the device, one for each list of tensors
_VALUES = (
    "weight1", "beta2", "weight2", "eps", "decay", "coupled_decay", "step_size", "denom_scale",
    "ema_weight",
)  # fmt: skip

# Placeholders for the scalars that the kernel reads from the device; the sign is a factor there.
_UNKNOWN = StepScalars._make([0.0] * 8 + [Direction.ADAPTIVE, 1.0, 0, 0.0])


class Again:
    """An update of the same tensors in step after step, with gradients that may be others.

    It holds addresses, and no tensors: whoever keeps it knows that they have not moved.
    """

    def __init__(self, kernel: TritonKernel, work: Sequence[Operands], rows: Sequence[Row]) -> None:
        first = work[0]
        self._kernel = kernel
        self._device = first.param.device
        self._wide = first.exp_avg.dtype == torch.float64
        self._table = Table(rows, self._device, kernel.chunk)
        self._dtypes = {
            "PARAM": kernel.dtype(first.param),
            "GRAD": kernel.dtype(first.grad),
            "STATE": kernel.dtype(first.exp_avg),
            "MAX": kernel.dtype(first.max_exp_avg_sq),
            "OUT": kernel.dtype(first.param_out),
            "REMAINDER": kernel.dtype(first.remainder),
            "EMA": kernel.dtype(first.param_ema),
            "EXPONENT": kernel.dtype(first.exp_avg_exponent),
            "MAX_EXPONENT": kernel.dtype(first.max_exp_avg_sq_exponent),
            "SLOTS": _slots(first),
        }

    def update_(
        self,
        grads: Sequence[int],
        scalars: Scalars,
        *,
        grad_scale: Tensor | float = 1.0,
        skip: Tensor | None = None,
    ) -> bool:
        """Apply one step in a single launch.

        Args:
            grads: The addresses of contiguous gradients, of the dtype and numbers of elements that
                this was made with.
            scalars: As for `TritonKernel.update_`, like the following.
            grad_scale: Likewise.
            skip: Likewise.

        Returns:
            Whether it was done; it cannot be while a graph is captured, if the last step before
            had other gradients.
        """
        with current(self._device):
            table = self._table.upload(grads)
            if table is None:
                return False
            values = self._kernel.values(scalars, grad_scale, skip, self._device, wide=self._wide)
            row = _row_numel(values["scalars_at"])
            self._kernel.update_many(table, {**values, **self._dtypes, "ROW": row})
        return True


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

            from belief_dist.kernels import triton_codec, triton_kernel
        except Exception as error:  # a broken installation can raise anything
            raise Unavailable(f"triton cannot be imported ({one_line(error)})") from error
        if triton_kernel.VERSION < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise Unavailable(f"Triton {triton.__version__} is too old: it takes {oldest} or newer")
        self._kernel = triton_kernel
        self.reductions = TritonReductions(interprets=self.interprets)
        self._codec = triton_codec
        self._tables: OrderedDict[tuple[Any, ...], Again] = OrderedDict()
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
            raise Unavailable(f"a first launch failed ({one_line(error)})") from error
        if not same:
            raise Unavailable("a first update has other bits than the reference")

    def serves(self, device: torch.device) -> bool:
        """Return whether the kernels work on tensors of this device."""
        return device.type == ("cpu" if self.interprets else "cuda")

    def updates(self, work: Sequence[Operands]) -> bool:
        """Return whether `update_` supports these tensors."""
        if isinstance(work, FixedOperands) and self in work.kept:  # as it was found before
            return True
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
            and (first.param_ema is None or first.param_ema.dtype in _averages(state))
            and (state == torch.uint8) == (first.exp_avg_exponent is not None)
            and (state != torch.uint8 or all(each.first % BLOCK == 0 for each in work))
        )

    def update_(
        self,
        work: Sequence[Operands],
        scalars: Scalars,
        *,
        grad_scale: Tensor | float = 1.0,
        skip: Tensor | None = None,
    ) -> None:
        """Apply one step in a single launch for any number of tensors.

        Args:
            work: As for `kernels.update_`.
            scalars: As for `kernels.update_`; those of `device_scalars` let a captured graph take
                the step and the learning rate of its replay.
            grad_scale: As for `rule.update_reference_`.
            skip: One element on the tensors' device; if it is not zero, nothing is changed.
        """
        kept = work.kept if isinstance(work, FixedOperands) else {}
        found = kept.get(self)
        if found is None:
            work = [operands for operands in work if operands.param.numel() > 0]
            if not work:
                return
            if len(work) > 1:
                addresses = [operands.grad.data_ptr() for operands in work]
                found = kept[self] = (self.again(work), addresses)
        if found is not None:
            again, grads = found
            if again.update_(grads, scalars, grad_scale=grad_scale, skip=skip):
                return
            work = [operands for operands in work if operands.param.numel() > 0]
        device = work[0].param.device
        wide = work[0].exp_avg.dtype == torch.float64
        with current(device):
            known: dict[int, dict[str, Any]] = {}
            for operands in work:
                if operands.scalars not in known:
                    own = _own(scalars, operands.scalars)
                    values = self.values(own, grad_scale, skip, device, wide=wide)
                    known[operands.scalars] = values
                self._update_one(operands, known[operands.scalars])

    def again(self, work: Sequence[Operands]) -> Again:
        """Return the update of these tensors with any gradients, which is kept for later steps."""
        rows = [_row(each) for each in work]
        kinds = (t.dtype if isinstance(t, Tensor) else None for t in work[0][:_TENSORS])
        name = (work[0].param.device, *kinds, _slots(work[0]), *rows)
        found = self._tables.get(name)
        if found is None:
            found = self._tables[name] = Again(self, work, rows)
            if len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(name)
        return found

    def encodes(self, wire: Tensor, values: Tensor, error: Tensor) -> bool:
        """Return whether `encode_int8_` supports these tensors."""
        return (
            all(t.is_contiguous() and self.serves(t.device) for t in (wire, values, error))
            and values.dtype == error.dtype
            and values.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and wire.data_ptr() % 4 == 0  # a scale is written at once
        )

    def encode_int8_(self, wire: Tensor, values: Tensor, error: Tensor) -> None:
        """Do what `eager.encode_int8_` does, in one launch."""
        blocks = values.numel() // CODE_BLOCK
        if blocks:
            with current(values.device):
                self._codec.encode_int8[(-(-blocks // self._codec.ROWS),)](
                    wire, values, error, blocks, ROWS=self._codec.ROWS, **self._options
                )

    def values(
        self,
        scalars: Scalars,
        grad_scale: Tensor | float,
        skip: Tensor | None,
        device: torch.device,
        *,
        wide: bool,
    ) -> dict[str, Any]:
        """Return the scalar arguments that both kernels share.

        Triton passes Python floats as float32, so for `wide` arithmetic, in float64, they are
        passed in device memory.
        """
        if isinstance(grad_scale, Tensor) and grad_scale.device != device:
            grad_scale = float(grad_scale)
        if wide and not isinstance(grad_scale, Tensor):
            grad_scale = torch.full((), grad_scale, dtype=torch.float64, device=device)
        if isinstance(scalars, list):
            listed = upload([float(x) for each in scalars for x in each], torch.float64, device)
            coupled = any(each.coupled_decay != 0.0 for each in scalars)
            scalars = DeviceScalars(listed.view(len(scalars), -1), coupled)
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
            sums=operands.sums,
            SLOTS=_slots(operands),
            **values,
            **self._options,
        )

    def update_many(self, table: Uploaded, values: dict[str, Any]) -> None:
        """Launch `update_many` on the current device; `values` hold also the tensors' dtypes."""
        self._kernel.update_many[(len(table.chunks) * self._kernel.CHUNK_TILES,)](
            table.segments,
            table.grads,
            table.chunks,
            **values,
            ALIGNED=table.aligned,
            CHUNK_TILES=self._kernel.CHUNK_TILES,
            **self._options,
        )

    @property
    def chunk(self) -> int:
        """Elements that share an entry of a table's map from programs to segments."""
        return int(self._kernel.TILE * self._kernel.CHUNK_TILES)

    def dtype(self, tensor: Tensor | None) -> Any:
        """Return Triton's name of a tensor's dtype, or None."""
        return None if tensor is None else self._kernel.DTYPES[tensor.dtype]


def _signed(word: int) -> int:
    """Return 32 bits as a signed integer: Triton chooses an argument's type by its value."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _row(operands: Operands) -> Row:
    """Return the row of `triton_tables.Table`: all but the gradient."""
    tensors = (operands.param, *operands[2:_TENSORS])
    addresses = (t.data_ptr() if isinstance(t, Tensor) else 0 for t in tensors)
    sums = 0 if operands.sums is None else operands.sums.data_ptr()
    numbers = operands.param.numel(), operands.key, operands.first, sums, operands.scalars
    return (*addresses, *numbers)


def _own(scalars: Scalars, position: int) -> StepScalars | DeviceScalars:
    """Return those of one operand."""
    if isinstance(scalars, list):
        return scalars[position]
    if isinstance(scalars, DeviceScalars) and scalars.values.dim() == 2:
        return DeviceScalars(scalars.values[position], scalars.coupled)
    return scalars


def _row_numel(scalars: Tensor | None) -> int | None:
    """Return how long the rows of scalars are, if there are rows."""
    return None if scalars is None or scalars.dim() == 1 else scalars.shape[1]


def _averages(state: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the dtypes of averages that go together with that of m."""
    return (state,) if state == torch.float64 else (torch.float32, torch.bfloat16)


def _slots(operands: Operands) -> int | None:
    return None if operands.sums is None else len(operands.sums)
