"""ShardedAdaBelief on real gloo processes: equal, bit for bit, to one process.

Two ranks would prove nothing about order (a + b commutes): every case runs on 1 to 4. Five show
that nothing ends at four: on them runs every feature, and of combinations every pair of choices.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.harness.ranks import run_ranks
from tests.harness.sharded_cases import combinations, equals_reference, main_comparison
from tests.harness.threads import run_threads


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_equals_one_process_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, tmp_path, *main_comparison())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_smaller_states_depend_on_no_sharding(world_size: int, tmp_path: Path) -> None:
    """Noise belongs to parameter, step and element; blocks of 8-bit states to their parameter."""
    choices = itertools.product(
        (1, 1500, 10**9),
        (
            {"state_dtype": torch.bfloat16},
            {"state_dtype": torch.uint8},
            {"state_dtype": torch.uint8, "unused": True, "options": {"amsgrad": True}},
            {"state_dtype": torch.uint8, "reduce_dtype": torch.bfloat16, "stage": 2},
            {"dtype": torch.bfloat16, "master": "remainder", "max_grad_norm": 1.0},
            {"dtype": torch.bfloat16, "state_dtype": torch.uint8, "micro_batches": 2},
            {"dtype": torch.bfloat16, "master": "remainder", "state_dtype": torch.uint8},
            {"dtype": torch.bfloat16, "master": "remainder8", "stage": 2},
            {
                "dtype": torch.bfloat16,
                "master": "remainder8",
                "state_dtype": torch.uint8,
                "offload": "cpu",
                "unused": True,
            },
        ),
    )
    cases = [partial(equals_reference, bytes_, True, **more) for bytes_, more in choices]
    run_ranks(world_size, tmp_path, *cases[:: 1 if world_size < 5 else 2])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_all_combinations(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, tmp_path, *combinations()[:: 1 if world_size < 5 else 3])


@pytest.mark.parametrize("world_size, every", [(2, 5), (3, 5), (4, 7), (5, 7), (8, 31)])
def test_other_backends(world_size: int, every: int) -> None:
    """The way of backends without messages between two ranks; a sample: threads take turns."""
    run_threads(world_size, *combinations()[::every])
