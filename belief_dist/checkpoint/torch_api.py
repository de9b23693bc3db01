"""`ShardedAdaBelief` behind torch's own get_optimizer_state_dict and set_optimizer_state_dict.

They ask an optimizer for its state_dict, and hand one back. Inside `logical_states` it is one of
logical tensors, which DCP saves and reshards, instead of this rank's shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from belief_dist.checkpoint.dcp_tensor import Pieces
from belief_dist.checkpoint.entries import STATES, join_masters, split_masters
from belief_dist.checkpoint.local_shards import Holding, holdings
from belief_dist.checkpoint.metadata import apply_options
from belief_dist.sharded import ShardedAdaBelief

MASTER = "master"


@contextmanager
def logical_states(optimizer: ShardedAdaBelief) -> Iterator[None]:
    """Let `optimizer.state_dict` and `load_state_dict` speak of whole parameters in this context.

    Then ``get_optimizer_state_dict`` returns tensors of the parameters' shapes that
    `torch.distributed.checkpoint` saves, and loads in place; ``set_optimizer_state_dict`` takes
    these, or plain whole tensors. What travels is, for each parameter, step, exp_avg, exp_avg_sq
    and, where it is kept apart from the parameter, the float32 master; and the options of groups.

    Raises:
        ValueError: States have 8 bits, whose blocks have no place in a tensor of that shape; use
            `belief_dist.checkpoint.save`.
    """
    if optimizer.options.state_dtype == torch.uint8:
        raise ValueError(
            "states of 8 bits do not fit into torch's optimizer state_dict; use "
            "belief_dist.checkpoint.save and load."
        )
    form = _LogicalForm(optimizer)
    changed: Any = optimizer
    changed.state_dict, changed.load_state_dict = form.state_dict, form.load_state_dict
    try:
        yield
    finally:
        del changed.state_dict, changed.load_state_dict


class _LogicalForm:
    def __init__(self, optimizer: ShardedAdaBelief) -> None:
        self._optimizer = optimizer

    def _targets(self) -> Iterator[tuple[Holding, dict[str, Pieces], Tensor | None]]:
        """Yield what is held of each parameter, by name of the state, and masters if joined."""
        count = sum(len(group["params"]) for group in self._optimizer.param_groups)
        names = list(map(str, range(count)))
        for holding in holdings(self._optimizer, names):
            held = holding.tensors
            joined = None
            found = {k: holding.pieces(held[k], held[k].dtype) for k in STATES if k in held}
            # Copies: weights that are loaded in between would replace the masters themselves.
            if "remainder" in held:
                joined = join_masters(held["param"], held["remainder"])
            elif held["param"].dtype != holding.param.dtype:
                joined = held["param"].clone()
            if joined is not None:
                found[MASTER] = holding.pieces(joined, joined.dtype)
            yield holding, found, joined

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        optimizer = self._optimizer
        optimizer.wait_pending()
        states, count = {}, 0
        groups = []
        for group in optimizer.param_groups:
            indices = list(range(count, count + len(group["params"])))
            groups.append({**group, "params": indices})
            count += len(indices)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for index, (_, found, _) in enumerate(self._targets()):
            states[index] = {"step": optimizer.state[params[index]]["step"], **found}
        return {"state": states, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        optimizer = self._optimizer
        optimizer.wait_pending()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, (holding, found, joined) in enumerate(self._targets()):
            entry = state_dict["state"].get(saved[index])
            if entry is None:
                continue
            for key, target in found.items():
                if key in entry:
                    _copy(entry[key], target)
            if MASTER in entry and joined is not None:
                param, remainder = holding.tensors["param"], holding.tensors.get("remainder")
                if remainder is None:
                    param.copy_(joined)
                else:
                    split_masters(joined, param, remainder)
            optimizer.state[params[index]]["step"] = int(entry["step"])
        without = [
            {k: v for k, v in group.items() if k not in ("params", "param_names")}
            for group in state_dict["param_groups"]
        ]
        apply_options(optimizer, without)
        optimizer.sync_params_from_masters(
            skipped_steps=optimizer.skipped_steps, seed=optimizer.options.seed
        )


def _copy(source: Tensor, target: Pieces) -> None:
    for offsets, piece in target.pieces.items():
        if isinstance(source, Pieces):
            own = source.pieces[offsets].read()
        else:
            own = source
            for dim, (offset, size) in enumerate(zip(offsets, piece.sizes, strict=True)):
                own = own.narrow(dim, offset, size)
        piece.read().copy_(own)
