"""The entries of a checkpoint, and how they are written from and read into an optimizer's shards.

======================================  =========================================================
key                                     tensor
======================================  =========================================================
``model.<name>``                        a weight as it is trained: the float32 master, if there is
                                        one; a buffer or frozen weight as the model has it
``optim.state.<name>.exp_avg``          m; also exp_avg_sq (s) and max_exp_avg_sq
``optim.state.<name>.param_ema``        average of the weight, with ema_decay
``optim.state.<name>.exp_avg_exponent`` exponents of the blocks of an 8-bit state, 1-D; also others
``optim.wire_error.<rank>.<name>``      error feedback of a rank with reduce_dtype=torch.int8
``belief_dist``                         plain values: see the module `metadata`
``extra``                               plain values of the caller
======================================  =========================================================

A master that is kept as two parts is joined when it is written and split when it is read, so the
checkpoint does not depend on that option. A state saved in another dtype, and a master with more
bits than are kept, is converted when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from belief_dist.checkpoint.dcp_tensor import DcpTensor
from belief_dist.checkpoint.local_shards import LocalShard
from belief_dist.checkpoint.metadata import SHORT_MASTERS
from belief_dist.operands import BLOCK
from belief_dist.state_dict import AVERAGE
from belief_dist.state_formats import (
    NEAREST8,
    decode_m,
    decode_s,
    encode_m,
    encode_s,
    join_master,
    split_master,
    split_rounded_master,
)

METADATA_KEY = "belief_dist"
EXTRA_KEY = "extra"
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", AVERAGE)
# Elements converted at a time, so that temporary memory stays small; a multiple of BLOCK.
_WINDOW = 1 << 18
# The encoders add 16 bits of noise and truncate: with half of the range they round to nearest.
_NEAREST = 1 << 15


def weight_key(name: str) -> str:
    """Return the key of a weight."""
    return f"model.{name}"


def state_key(name: str, state: str) -> str:
    """Return the key of a state of the parameter `name`."""
    return f"optim.state.{name}.{state}"


def wire_error_key(name: str, rank: int) -> str:
    """Return the key of the error feedback that `rank` keeps for the parameter `name`."""
    return f"optim.wire_error.{rank}.{name}"


# - Writing


def shard_entries(shard: LocalShard, rank: int) -> dict[str, DcpTensor]:
    """Return the entries that this rank writes for a parameter."""
    name = shard.name
    found = {weight_key(name): _weight(shard)}
    for key, tensor in shard.tensors.items():
        if key in STATES:
            found[state_key(name, key)] = shard.dcp_tensor(tensor, tensor.dtype)
        elif key.endswith("_exponent"):
            span = _block_span(shard.start, shard.stop)
            found[state_key(name, key)] = shard.exponent_tensor(tensor, span=span)
        elif key == "wire_error":
            whole = (0, tensor.numel())
            found[wire_error_key(name, rank)] = shard.dcp_tensor(tensor, tensor.dtype, span=whole)
    return found


def _weight(shard: LocalShard) -> DcpTensor:
    param, remainder = shard.tensors["param"], shard.tensors.get("remainder")
    if remainder is None:
        return shard.dcp_tensor(param, param.dtype)
    lower = remainder
    return shard.dcp_tensor(lambda a, b: join_masters(param[a:b], lower[a:b]), torch.float32)


def join_masters(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the float32 masters (n,) of two halves, window by window."""
    joined = torch.empty(upper.numel(), dtype=torch.float32, device=upper.device)
    for a, b in _windows(0, joined.numel()):
        joined[a:b] = join_master(upper[a:b], lower[a:b])
    return joined


def split_masters(masters: Tensor, upper: Tensor, lower: Tensor) -> None:
    """Split float32 masters (n,) into `upper` and `lower`, window by window.

    Where `lower` has 8 bits, what is left of the masters is the nearest one of 24 bits.
    """
    for a, b in _windows(0, masters.numel()):
        window = masters[a:b]
        is_short = lower.dtype == torch.int8
        parts = split_rounded_master(window, NEAREST8) if is_short else split_master(window)
        upper[a:b], lower[a:b] = parts


def _windows(start: int, stop: int) -> Iterable[tuple[int, int]]:
    return ((a, min(a + _WINDOW, stop)) for a in range(start, stop, _WINDOW))


def _block_span(start: int, stop: int) -> tuple[int, int]:
    return (start // BLOCK, -(-stop // BLOCK)) if stop > start else (0, 0)


# - Reading


class ShardLoadPlan:
    """What DCP reads for an optimizer's shards, and how the result gets into them.

    Attributes:
        entries: Filled by DCP: the shard itself where `copy_` converts the dtype, otherwise
            temporary memory.
        finish: Called when DCP has filled the entries, in any order.
        changes: Sentences about weights, masters and states that change precision.
    """

    def __init__(self, dcp_metadata: Metadata, metadata: Mapping[str, Any]) -> None:
        """Start an empty plan for a checkpoint with this metadata."""
        self.entries: dict[str, DcpTensor] = {}
        self.finish: list[Callable[[], object]] = []
        self.changes: set[str] = set()
        self._saved = dcp_metadata.state_dict_metadata
        self._metadata = metadata

    def add(self, shard: LocalShard) -> None:
        """Plan to read the weight and the states of a parameter.

        Raises:
            ValueError: The checkpoint has no such parameter, or one of another shape.
        """
        weight = self._add_weight(shard)
        tensors = shard.tensors
        has_state = shard.name in self._metadata.get("steps", {})
        for key in STATES:
            is_saved = state_key(shard.name, key) in self._saved
            if key not in tensors:
                if key == AVERAGE and is_saved:
                    self.changes.add("averages of the weights are left out: none are kept here")
                continue
            if key == AVERAGE and not is_saved:
                self.changes.add("averages were not saved and start from the weights that are read")
                self.finish.append(partial(tensors[key].copy_, weight))
            elif has_state:
                self._add_state(shard, key)
            else:
                # Saved before this parameter's first step: start from zero states again.
                self.finish.extend(
                    tensors[part].zero_ for part in (key, f"{key}_exponent") if part in tensors
                )

    def _saved_dtype(self, shard: LocalShard, key: str) -> torch.dtype:
        """Return the dtype of a saved tensor after comparing its shape with the parameter's."""
        entry = self._saved.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"it has no {key!r}.")
        if entry.size != shard.param.shape:
            raise ValueError(
                f"the shape of {key!r} is {tuple(entry.size)} in it, and parameter "
                f"{shard.name!r} has {tuple(shard.param.shape)} here."
            )
        return entry.properties.dtype

    def _add_weight(self, shard: LocalShard) -> Tensor:
        """Plan to read the weight; return where it will be when DCP has filled the entries."""
        key = weight_key(shard.name)
        saved = self._saved_dtype(shard, key)
        param, remainder = shard.tensors["param"], shard.tensors.get("remainder")
        own = param.dtype if remainder is None else torch.float32
        self.note_dtype_change("weights", saved, own)
        if remainder is None:
            self.entries[key] = shard.dcp_tensor(param, own)
            return param
        lower = remainder
        is_long = saved.itemsize >= 4 and shard.name not in self._metadata.get(SHORT_MASTERS, ())
        if is_long and lower.dtype == torch.int8:
            self.changes.add("masters were saved with 32 bits and are read with 24, to nearest")
        joined = torch.empty(param.numel(), dtype=torch.float32, device=param.device)
        self.entries[key] = shard.dcp_tensor(joined, own)
        self.finish.append(lambda: split_masters(joined, param, lower))
        return joined

    def _add_state(self, shard: LocalShard, key: str) -> None:
        own = shard.tensors[key]
        where = state_key(shard.name, key)
        saved = self._saved_dtype(shard, where)
        self.note_dtype_change(key, saved, own.dtype)
        if saved == torch.uint8:
            self._add_codes(shard, key, own)
        elif own.dtype == torch.uint8:
            wide = torch.empty(own.numel(), dtype=torch.float32, device=own.device)
            self.entries[where] = shard.dcp_tensor(wide, torch.float32)
            exponent = shard.tensors[f"{key}_exponent"]
            self.finish.append(lambda: _encode_all(key, wide, own, exponent))
        else:
            self.entries[where] = shard.dcp_tensor(own, own.dtype)

    def _add_codes(self, shard: LocalShard, key: str, own: Tensor) -> None:
        """Plan to read the 8-bit codes of all blocks that this shard touches.

        Blocks count elements in memory order, so that order must be the one they were saved with.
        """
        name = shard.name
        order = self._metadata.get("memory_order", {}).get(name)
        if order is not None and tuple(order) != shard.order:
            raise ValueError(
                f"its 8-bit {key} of {name!r} has its dimensions in memory in the order "
                f"{tuple(order)}, and the parameter has {shard.order} here; use the memory "
                f"format it was saved with."
            )
        blocks = _block_span(shard.start, shard.stop)
        start = blocks[0] * BLOCK
        stop = min(blocks[1] * BLOCK, shard.local.numel())
        exponent = shard.tensors.get(f"{key}_exponent")
        codes = own
        if own.dtype != torch.uint8:
            codes = torch.empty(stop - start, dtype=torch.uint8, device=own.device)
            exponent = torch.empty(blocks[1] - blocks[0], dtype=torch.uint8, device=own.device)
            wide = codes, exponent
            self.finish.append(lambda: _decode_all(key, *wide, own, shard.start - start))
        assert exponent is not None
        self.entries[state_key(name, key)] = shard.dcp_tensor(
            codes, torch.uint8, span=(start, stop)
        )
        self.entries[state_key(name, f"{key}_exponent")] = shard.exponent_tensor(
            exponent, span=blocks
        )

    def note_dtype_change(self, what: str, saved: torch.dtype, own: torch.dtype) -> None:
        """Add a sentence to `changes` if the two dtypes differ."""
        if saved == own:
            return
        names = [str(dtype).removeprefix("torch.") for dtype in (saved, own)]
        loses = own.itemsize < saved.itemsize
        how = "rounded to nearest" if loses else "exactly"
        self.changes.add(f"{what} were saved as {names[0]} and are read as {names[1]}, {how}")

    def add_wire_errors(self, shard: LocalShard, rank: int, num_ranks: int) -> None:
        """Plan to read this rank's error feedback.

        If the number of ranks is the one that saved it, every rank gets its own. Otherwise rank r
        gets the sum over the old ranks r, r + num_ranks, ..., scaled so that the errors contribute
        the same amount to the mean gradient.
        """
        own = shard.tensors.get("wire_error")
        if own is None:
            return
        old_ranks = int(self._metadata.get("ranks", 0))
        sources = [r for r in range(old_ranks) if wire_error_key(shard.name, r) in self._saved]
        mine = [r for r in sources if r % num_ranks == rank]
        whole = (0, own.numel())
        if old_ranks == num_ranks and mine == [rank]:
            self.entries[wire_error_key(shard.name, rank)] = shard.dcp_tensor(
                own, own.dtype, span=whole
            )
            return
        parts = [torch.empty_like(own, dtype=torch.float32) for _ in mine]
        for source, part in zip(mine, parts, strict=True):
            self.entries[wire_error_key(shard.name, source)] = shard.dcp_tensor(
                part, torch.float32, span=whole
            )
        if sources:
            self.changes.add(
                f"wire errors of {old_ranks} ranks are distributed over {num_ranks}, in their mean"
            )

        def add_up() -> None:
            own.zero_()
            if parts:
                own.copy_(torch.stack(parts).sum(0) * (num_ranks / old_ranks))

        self.finish.append(add_up)


def _encode_all(key: str, wide: Tensor, codes: Tensor, exponents: Tensor) -> None:
    encode = encode_m if key == "exp_avg" else encode_s
    for a, b in _windows(0, wide.numel()):
        nearest = torch.full((b - a,), _NEAREST, dtype=torch.int64, device=wide.device)
        code, exponent = encode(wide[a:b], nearest)
        codes[a:b] = code
        exponents[a // BLOCK : -(-b // BLOCK)] = exponent


def _decode_all(key: str, codes: Tensor, exponents: Tensor, own: Tensor, skip: int) -> None:
    """Decode whole blocks, and copy to `own` the elements from `skip` on that this rank holds."""
    decode = decode_m if key == "exp_avg" else decode_s
    for a, b in _windows(0, codes.numel()):
        values = decode(codes[a:b], exponents[a // BLOCK : -(-b // BLOCK)])
        first, last = max(a, skip), min(b, skip + own.numel())
        if first < last:
            own[first - skip : last - skip] = values[first - a : last - a]
