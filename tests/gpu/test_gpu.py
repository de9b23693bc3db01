"""What `make gpu` finds right or wrong, as tests: bits, ranks, graphs, trainings, waiting."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from belief_dist import kernels
from belief_dist.kernels.triton_launch import TritonKernel
from benchmarks.gpu import contenders, forms, graph, ranks, sums, training
from benchmarks.gpu.cases import FULL, SMALL, Case
from benchmarks.gpu.timing import synchronizing
from benchmarks.gpu.worker import run_case

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore"),
]

SIZE = SMALL._replace(bits=100_003, job=FULL.job, steps=FULL.steps)
CHECKS = [
    case for module in (forms, sums, graph, training, ranks) for case in module.cases("cuda", SIZE)
]


@pytest.mark.parametrize("case", CHECKS, ids=lambda case: f"{case.table}: {case.name}")
def test_on_a_gpu(case: Case) -> None:
    rows = run_case(case)
    bad = [row for row in rows if row["status"] != "ok"]
    if bad and not any(row["counts"] for row in bad):
        pytest.xfail(str(bad))
    assert not bad


def test_triton_serves() -> None:
    assert isinstance(kernels._kernel(torch.device("cuda")), TritonKernel)


@pytest.mark.parametrize(
    "name", [name for name in contenders.OURS if name not in ("compute only", "AdaBelief")]
)
def test_no_step_makes_the_host_wait(name: str) -> None:
    if "offload" in name:
        pytest.skip("the host computes: it must wait for the gradients")
    model = SIZE.job.model(torch.bfloat16, "cuda")
    contender = contenders.OURS[name](model, "cuda")
    run = partial(contender.accumulate_and_clip, SIZE.job.tokens("cuda"))
    for _ in range(3):
        run()
    assert synchronizing(run, "cuda") == "none"
