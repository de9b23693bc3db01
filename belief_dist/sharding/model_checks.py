"""What ranks compare before anything is sent: their models and options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from belief_dist.engine_options import EngineOptions
from belief_dist.sharding.collectives import Collectives
from belief_dist.sharding.dtensor import local_part
from belief_dist.sharding.group_options import ParamGroups, options_of
from belief_dist.sharding.layout import Layout
from belief_dist.sharding.process_groups import ModelParallel
from belief_dist.sharding.rank_checks import compare_order, compare_ranks
from belief_dist.sharding.rank_sets import RankSet


def compare_models(
    comm: Collectives,
    model_parallel: ModelParallel,
    sets: Sequence[RankSet],
    layout: Layout,
    params: Sequence[Tensor],
    param_groups: ParamGroups,
    options: EngineOptions,
) -> None:
    """Compare model and options over the ranks: a mismatch is an error and not a hang.

    Called by all ranks.

    Args:
        comm: All ranks of the optimizer.
        model_parallel: The ranks that hold other parts of the model.
        sets: Who shares which parameters.
        layout: Of all parameters.
        params: All parameters.
        param_groups: With the options of each.
        options: Of the engine.

    Raises:
        ValueError: On all ranks: they differ.
    """
    of_groups: dict[str, list[Any]] = {"options of param group": options_of(param_groups)}
    # Experts have other names where other ranks hold them.
    specs = [each.unnamed if each.ranks else each for each in layout.params]
    model: dict[str, list[Any]] = {"number of parameters": [len(specs)], "parameter": specs}
    compare_ranks(comm, {**model, **of_groups, **options.by_name()})
    for ranks in sets:
        if not ranks.is_all:
            specs = [layout.params[index] for index in ranks.params]
            compare_ranks(ranks.comm, {"parameter of a group with its own ranks": specs})
        compare_order(ranks.comm, layout.params, list(map(local_part, params)), ranks.params)
    # Ranks of other parts hold tensors of other shapes, but train with the same options.
    alike = of_groups
    if not model_parallel.have_same_groups:  # but norms are those of all stages
        limits = {number: group["max_grad_norm"] for number, group in enumerate(param_groups)}
        own = [each for each in limits.items() if each[1] is not None]
        alike = {"param groups with a norm of their own, and its max_grad_norm": [own]}
    compare_ranks(model_parallel.comm, {**alike, **options.by_name()})
