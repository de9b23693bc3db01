"""`ShardedAdaBelief` under torch's own get_optimizer_state_dict and set_optimizer_state_dict.

These call the optimizer's `state_dict` and `load_state_dict`. Inside `logical_states` the
state_dict holds logical tensors, which DCP saves and reshards, instead of this rank's shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from belief_dist.checkpoint.dcp_tensor import DcpTensor
from belief_dist.checkpoint.entries import STATES, join_masters, split_masters
from belief_dist.checkpoint.local_shards import LocalShard, local_shards
from belief_dist.checkpoint.metadata import apply_options
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.state_dict import AVERAGE, answered_by
from belief_dist.state_init_step import wants_full_state

MASTER = "master"


@contextmanager
def logical_states(optimizer: ShardedAdaBelief) -> Iterator[None]:
    """In this context, `optimizer.state_dict` and `load_state_dict` work on logical tensors.

    ``get_optimizer_state_dict`` then returns tensors of the parameters' shapes, which
    `torch.distributed.checkpoint` saves and loads in place; ``set_optimizer_state_dict`` takes
    these, or plain tensors of the same shapes. They are, for each parameter, step, exp_avg,
    exp_avg_sq, its average, if one is kept, and, if it is separate from the parameter, the float32
    master; and the options of the groups.

    Raises:
        ValueError: States have 8 bits, whose block exponents do not fit into a tensor of the
            parameter's shape; use `belief_dist.checkpoint.save`.
    """
    if optimizer.options.state_dtype == torch.uint8:
        raise ValueError(
            "states of 8 bits do not fit into torch's optimizer state_dict; use "
            "belief_dist.checkpoint.save and load."
        )
    form = _LogicalForm(optimizer)
    with answered_by(optimizer, state_dict=form.state_dict, load_state_dict=form.load_state_dict):
        yield


class _LogicalForm:
    def __init__(self, optimizer: ShardedAdaBelief) -> None:
        self._optimizer = optimizer

    def _targets(self) -> Iterator[tuple[LocalShard, dict[str, DcpTensor], Tensor | None]]:
        """Yield (shard, its tensors for DCP, copy of the masters or None) for each parameter."""
        count = sum(len(group["params"]) for group in self._optimizer.param_groups)
        names = list(map(str, range(count)))
        for shard in local_shards(self._optimizer, names):
            tensors = shard.tensors
            masters = None
            targets = {
                key: shard.dcp_tensor(tensors[key], tensors[key].dtype)
                for key in STATES
                if key in tensors
            }
            # Copies: setting the model's weights in between would overwrite the masters themselves.
            if "remainder" in tensors:
                masters = join_masters(tensors["param"], tensors["remainder"])
            elif tensors["param"].dtype != shard.param.dtype:
                masters = tensors["param"].clone()
            if masters is not None:
                targets[MASTER] = shard.dcp_tensor(masters, masters.dtype)
            yield shard, targets, masters

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        if wants_full_state():
            raise RuntimeError(
                "full_state_dict=True asks for whole tensors, and a rank of ShardedAdaBelief has "
                "its shard. Leave it out and save with torch.distributed.checkpoint, or use "
                "belief_dist.checkpoint.save, and `belief-dist checkpoint convert --to torch` for "
                "one file."
            )
        optimizer = self._optimizer
        optimizer.wait_pending()
        states, count = {}, 0
        groups = []
        for group in optimizer.param_groups:
            indices = list(range(count, count + len(group["params"])))
            groups.append({**group, "params": indices})
            count += len(indices)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for index, (_, targets, _) in enumerate(self._targets()):
            states[index] = {"step": optimizer.state[params[index]]["step"], **targets}
        return {"state": states, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        optimizer = self._optimizer
        optimizer.wait_pending()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        without_average = []
        for index, (shard, targets, masters) in enumerate(self._targets()):
            entry = state_dict["state"].get(saved[index])
            if entry is None:
                continue
            for key, target in targets.items():
                if key in entry:
                    _copy(entry[key], target)
                elif key == AVERAGE:
                    without_average.append(index)
            if MASTER in entry and masters is not None:
                param, remainder = shard.tensors["param"], shard.tensors.get("remainder")
                if remainder is None:
                    param.copy_(masters)
                else:
                    split_masters(masters, param, remainder)
            optimizer.state[params[index]]["step"] = int(entry["step"])
        options = [
            {k: v for k, v in group.items() if k not in ("params", "param_names")}
            for group in state_dict["param_groups"]
        ]
        apply_options(optimizer, options)
        optimizer.sync_params_from_masters(
            skipped_steps=optimizer.skipped_steps, seed=optimizer.options.seed
        )
        optimizer._engine.update.start_averages(without_average)


def _copy(source: Tensor, target: DcpTensor) -> None:
    for offsets, chunk in target.chunks.items():
        if isinstance(source, DcpTensor):
            part = source.chunks[offsets].read()
        else:
            part = source
            for dim, (offset, size) in enumerate(zip(offsets, chunk.sizes, strict=True)):
                part = part.narrow(dim, offset, size)
        chunk.read().copy_(part)
