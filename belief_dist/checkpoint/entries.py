"""From an optimizer to what a checkpoint holds, and back: one entry for each logical tensor.

======================================  =========================================================
key                                     tensor
======================================  =========================================================
``model.<name>``                        a weight as it is trained: the float32 master, if there is
                                        one; a buffer or frozen weight as the model has it
``optim.state.<name>.exp_avg``          m; also exp_avg_sq (s) and max_exp_avg_sq
``optim.state.<name>.exp_avg_exponent`` of the blocks of an 8-bit state, flat; also of the others
``optim.wire_error.<rank>.<name>``      what a rank has yet to send with reduce_dtype=torch.int8
``belief_dist``                         see `description`
``extra``                               what the caller has added
======================================  =========================================================

Wherever a master lies as two halves, it is joined when it is written and split when it is read, so
that a checkpoint does not know of it. A state of another dtype is converted when it is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from belief_dist.checkpoint.dcp_tensor import Pieces
from belief_dist.checkpoint.local_shards import Holding
from belief_dist.operands import BLOCK
from belief_dist.state_formats import (
    decode_m,
    decode_s,
    encode_m,
    encode_s,
    join_master,
    split_master,
)

logger = logging.getLogger("belief_dist")

DESCRIPTION = "belief_dist"
EXTRA = "extra"
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# Elements that are converted at once; a multiple of BLOCK.
_AT_ONCE = 1 << 18
_NEAREST = 1 << 15  # as "noise", it rounds to nearest

Finish = Callable[[], object]


def weight_key(name: str) -> str:
    """Return the key of a weight."""
    return f"model.{name}"


def state_key(name: str, state: str) -> str:
    """Return the key of a state of the parameter `name`."""
    return f"optim.state.{name}.{state}"


def error_key(name: str, rank: int) -> str:
    """Return the key of what `rank` has yet to send of the gradient of `name`."""
    return f"optim.wire_error.{rank}.{name}"


# - Writing


def entries_of(holding: Holding, rank: int) -> dict[str, Pieces]:
    """Return what this rank writes of a parameter."""
    held, name = holding.tensors, holding.name
    found = {weight_key(name): _weight(holding)}
    for key, tensor in held.items():
        if key in STATES:
            found[state_key(name, key)] = holding.pieces(tensor, tensor.dtype)
        elif key.endswith("_exponent"):
            span = _block_span(holding.start, holding.stop)
            found[state_key(name, key)] = holding.block_pieces(tensor, span=span)
        elif key == "wire_error":
            whole = (0, tensor.numel())
            found[error_key(name, rank)] = holding.pieces(tensor, tensor.dtype, span=whole)
    return found


def _weight(holding: Holding) -> Pieces:
    param, remainder = holding.tensors["param"], holding.tensors.get("remainder")
    if remainder is None:
        return holding.pieces(param, param.dtype)
    lower = remainder
    return holding.pieces(lambda a, b: join_masters(param[a:b], lower[a:b]), torch.float32)


def join_masters(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the masters (n,) of these halves, with little memory besides."""
    joined = torch.empty(upper.numel(), dtype=torch.float32, device=upper.device)
    for a, b in _windows(0, joined.numel()):
        joined[a:b] = join_master(upper[a:b], lower[a:b])
    return joined


def split_masters(masters: Tensor, upper: Tensor, lower: Tensor) -> None:
    """Write the halves of masters (n,), with little memory besides."""
    for a, b in _windows(0, masters.numel()):
        upper[a:b], lower[a:b] = split_master(masters[a:b])


def _windows(start: int, stop: int) -> Iterable[tuple[int, int]]:
    return ((a, min(a + _AT_ONCE, stop)) for a in range(start, stop, _AT_ONCE))


def _block_span(start: int, stop: int) -> tuple[int, int]:
    return (start // BLOCK, -(-stop // BLOCK)) if stop > start else (0, 0)


# - Reading


class Reading:
    """What to read into an optimizer, and what to do with it then.

    Attributes:
        entries: To be filled by DCP: in place where the dtype is the same or narrows and widens by
            itself.
        finish: To be called afterwards, in any order.
        changes: Sentences about states that change precision.
    """

    def __init__(self, metadata: Metadata, description: Mapping[str, Any]) -> None:
        """Read a checkpoint with this `metadata` and `description`."""
        self.entries: dict[str, Pieces] = {}
        self.finish: list[Finish] = []
        self.changes: set[str] = set()
        self._saved = metadata.state_dict_metadata
        self._description = description

    def add(self, holding: Holding) -> None:
        """Read all that is held of a parameter, wire errors excepted.

        Raises:
            ValueError: The checkpoint's parameter is another one.
        """
        self._add_weight(holding)
        name, held = holding.name, holding.tensors
        known = name in self._description.get("steps", {})
        for key in STATES:
            if key not in held:
                continue
            if known:
                self._add_state(holding, key)
            else:
                self.finish.extend(
                    held[part].zero_ for part in (key, f"{key}_exponent") if part in held
                )

    def _dtype(self, holding: Holding, key: str) -> torch.dtype:
        """Return the dtype of a saved tensor after comparing its shape with the parameter's."""
        entry = self._saved.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"it has no {key!r}.")
        if entry.size != holding.param.shape:
            raise ValueError(
                f"the shape of {key!r} is {tuple(entry.size)} in it, and parameter "
                f"{holding.name!r} has {tuple(holding.param.shape)} here."
            )
        return entry.properties.dtype

    def _add_weight(self, holding: Holding) -> None:
        key = weight_key(holding.name)
        saved = self._dtype(holding, key)
        param, remainder = holding.tensors["param"], holding.tensors.get("remainder")
        own = param.dtype if remainder is None else torch.float32
        self.note("weights", saved, own)
        if remainder is None:
            self.entries[key] = holding.pieces(param, own)
            return
        lower = remainder
        joined = torch.empty(param.numel(), dtype=torch.float32, device=param.device)
        self.entries[key] = holding.pieces(joined, own)
        self.finish.append(lambda: split_masters(joined, param, lower))

    def _add_state(self, holding: Holding, key: str) -> None:
        own = holding.tensors[key]
        where = state_key(holding.name, key)
        saved = self._dtype(holding, where)
        self.note(key, saved, own.dtype)
        if saved == torch.uint8:
            self._add_codes(holding, key, own)
        elif own.dtype == torch.uint8:
            wide = torch.empty(own.numel(), dtype=torch.float32, device=own.device)
            self.entries[where] = holding.pieces(wide, torch.float32)
            exponent = holding.tensors[f"{key}_exponent"]
            self.finish.append(lambda: _encode_all(key, wide, own, exponent))
        else:
            self.entries[where] = holding.pieces(own, own.dtype)

    def _add_codes(self, holding: Holding, key: str, own: Tensor) -> None:
        """Read 8-bit codes of whole blocks, which lie in memory as they did then."""
        name = holding.name
        order = self._description.get("memory_order", {}).get(name)
        if order is not None and tuple(order) != holding.order:
            raise ValueError(
                f"its 8-bit {key} of {name!r} has its dimensions in memory in the order "
                f"{tuple(order)}, and the parameter has {holding.order} here; use the memory "
                f"format of then."
            )
        blocks = _block_span(holding.start, holding.stop)
        start = blocks[0] * BLOCK
        stop = min(blocks[1] * BLOCK, holding.local.numel())
        exponent = holding.tensors.get(f"{key}_exponent")
        codes = own
        if own.dtype != torch.uint8:
            codes = torch.empty(stop - start, dtype=torch.uint8, device=own.device)
            exponent = torch.empty(blocks[1] - blocks[0], dtype=torch.uint8, device=own.device)
            wide = codes, exponent
            self.finish.append(lambda: _decode_all(key, *wide, own, holding.start - start))
        assert exponent is not None
        self.entries[state_key(name, key)] = holding.pieces(codes, torch.uint8, span=(start, stop))
        self.entries[state_key(name, f"{key}_exponent")] = holding.block_pieces(
            exponent, span=blocks
        )

    def note(self, what: str, saved: torch.dtype, own: torch.dtype) -> None:
        """Keep a sentence in `changes` if the two differ."""
        if saved == own:
            return
        names = [str(dtype).removeprefix("torch.") for dtype in (saved, own)]
        loses = own.itemsize < saved.itemsize
        how = "rounded to nearest" if loses else "exactly"
        self.changes.add(f"{what} were saved as {names[0]} and are read as {names[1]}, {how}")

    def add_errors(self, holding: Holding, rank: int, num_ranks: int) -> None:
        """Read what this rank has yet to send, from as many ranks as there were.

        With as many ranks as then, every rank has its own. With another number, rank r takes those
        of ranks r, r + num_ranks, ..., scaled so that the mean gradient gets as much of them.
        """
        own = holding.tensors.get("wire_error")
        if own is None:
            return
        before = int(self._description.get("ranks", 0))
        sources = [r for r in range(before) if error_key(holding.name, r) in self._saved]
        mine = [r for r in sources if r % num_ranks == rank]
        whole = (0, own.numel())
        if before == num_ranks and mine == [rank]:
            self.entries[error_key(holding.name, rank)] = holding.pieces(own, own.dtype, span=whole)
            return
        parts = [torch.empty_like(own, dtype=torch.float32) for _ in mine]
        for source, part in zip(mine, parts, strict=True):
            self.entries[error_key(holding.name, source)] = holding.pieces(
                part, torch.float32, span=whole
            )
        if sources:
            self.changes.add(
                f"wire errors of {before} ranks are distributed over {num_ranks}, in their mean"
            )

        def add_up() -> None:
            own.zero_()
            if parts:
                own.copy_(torch.stack(parts).sum(0) * (num_ranks / before))

        self.finish.append(add_up)


def _encode_all(key: str, wide: Tensor, codes: Tensor, exponents: Tensor) -> None:
    encode = encode_m if key == "exp_avg" else encode_s
    for a, b in _windows(0, wide.numel()):
        nearest = torch.full((b - a,), _NEAREST, dtype=torch.int64, device=wide.device)
        code, exponent = encode(wide[a:b], nearest)
        codes[a:b] = code
        exponents[a // BLOCK : -(-b // BLOCK)] = exponent


def _decode_all(key: str, codes: Tensor, exponents: Tensor, own: Tensor, skip: int) -> None:
    """Decode whole blocks and copy the part that is held, which begins at element `skip`."""
    decode = decode_m if key == "exp_avg" else decode_s
    for a, b in _windows(0, codes.numel()):
        values = decode(codes[a:b], exponents[a // BLOCK : -(-b // BLOCK)])
        first, last = max(a, skip), min(b, skip + own.numel())
        if first < last:
            own[first - skip : last - skip] = values[first - a : last - a]
