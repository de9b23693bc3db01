"""Every DeepSpeed JSON under configs/, run at small size; fp16 on CPUs that have it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

import belief_dist
from tests.harness.forked import Job, run_all_forked
from tests.harness.launch import largest_difference
from tests.harness.paths import ROOT
from zero_stages_job import ROWS, STEPS, WORLD_SIZE, make_batch, make_model, param_groups

JOB = Path(__file__).with_name("zero_stages_job.py")
CONFIGS = ROOT / "configs"
NEED_FP16 = {"deepspeed_zero2_fp16"}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# ShardedAdaBelief is another engine, with tests of its own.
NAMES = sorted(
    path.stem
    for path in CONFIGS.glob("deepspeed_*.json")
    if read(path)["optimizer"]["type"] == "AdaBelief"
)
RUN = [n for n in NAMES if n not in NEED_FP16 or get_accelerator().is_fp16_supported()]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_matters_is_left_to_defaults(name: str) -> None:
    """eps, where 1e-8 is the habit, and clipping, whose default DeepSpeed has changed before."""
    config = read(CONFIGS / f"{name}.json")
    assert config["optimizer"]["params"]["eps"] == 1e-16
    assert config["gradient_clipping"] == 1.0
    assert "stage" in config["zero_optimization"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Give a function name -> what each rank saved; one job runs all configs but that for NVMe."""

    @functools.cache
    def launched(nvme: bool) -> Path:
        folder = tmp_path_factory.mktemp("configs")
        for name in RUN:
            if name.endswith("nvme") == nvme:
                config = read(CONFIGS / f"{name}.json") | {"train_micro_batch_size_per_gpu": ROWS}
                for section in config["zero_optimization"].values():
                    if not isinstance(section, dict):
                        continue
                    if nvme:
                        section["nvme_path"] = str(folder / "nvme")
                    else:  # without a GPU nothing is pinned, but DeepSpeed would compile it
                        section["pin_memory"] = False
                (folder / f"{name}.json").write_text(json.dumps(config))
        run_all_forked(JOB, folder, [Job(WORLD_SIZE, [folder])])
        return folder

    def results(name: str) -> list[dict[str, Any]]:
        folder = launched(name.endswith("nvme"))
        return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(WORLD_SIZE)]

    return results


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.nvme if n.endswith("nvme") else ()) for n in RUN]
)
def test_it_trains_as_one_process_does(
    trained: Callable[[str], list[dict[str, Any]]], name: str
) -> None:
    if name.endswith("nvme") and not Path("/usr/include/libaio.h").exists():
        pytest.skip("DeepSpeed's NVMe offload needs libaio: apt-get install libaio-dev")
    params = read(CONFIGS / f"{name}.json")["optimizer"]["params"]
    expected = unsharded(params)
    # bfloat16 has 8 bits, float16 11; else DeepSpeed's sums in another order are all that differs.
    tolerance = {"bf16": 1e-2, "fp16": 2e-3}.get(name.rpartition("_")[2], 2e-5)
    for result in trained(name):
        assert result["optimizer"] == "belief_dist.optimizer.AdaBelief"
        assert largest_difference(result["trajectory"][-1], expected) < tolerance


def unsharded(params: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Train in this process on the global batch; return the parameters."""
    model = make_model()
    optimizer = belief_dist.AdaBelief(param_groups(model), **params)
    for step in range(STEPS):
        inputs, targets = make_batch(step, WORLD_SIZE * ROWS)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_deepspeed_reads_what_needs_fp16(tmp_path: Path) -> None:
    """Most CPUs lack it: DeepSpeed's own class reads the file, and refuses a wrong copy of it."""
    program = (
        "import sys, deepspeed\n"
        "for path in sys.argv[1:]:\n"
        "    try: deepspeed.DeepSpeedConfig(path)\n"
        "    except ValueError as error: print(path, 'refused:', *str(error).split())\n"
        "    else: print(path, 'read')"
    )
    files: dict[bool, list[str]] = {True: [], False: []}
    for name in NEED_FP16:
        config = read(CONFIGS / f"{name}.json") | {"train_batch_size": 8}
        section = next(key for key in ("fp16", "bf16") if key in config)
        wrong = config | {section: config[section] | {"loss_skale": 1}}
        for good, text in ((True, config), (False, wrong)):
            file = tmp_path / f"{name}.{good}.json"
            file.write_text(json.dumps(text))
            files[good].append(str(file))
    done = subprocess.run(
        [sys.executable, "-c", program, *files[True], *files[False]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for file in files[True]:
        assert f"{file} read" in said
    for file in files[False]:
        (refused,) = [line for line in said if line.startswith(f"{file} refused: ")]
        assert "loss_skale" in refused
