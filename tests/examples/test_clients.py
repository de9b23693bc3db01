"""AdaBelief through Hugging Face's Trainer, Accelerate, Lightning and plain DeepSpeed, on 2 ranks.

Numbers prove which optimizer ran: with a tiny eps AdaBelief's first step is lr / beta1, Adam's lr.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import belief_dist
from benchmarks.jobs import free_port, run_job
from clients_job import BETAS, LR
from tests.harness.paths import BIN, ROOT

WITHOUT_SHM = ROOT / "tests" / "harness" / "without_shm.py"
DEEPSPEED = [BIN / "deepspeed", "--no_local_rank", "--num_accelerators", 2]
DEEPSPEED += ["--master_addr", "127.0.0.1", "--master_port"]

ADABELIEF_RUNS = [
    "trainer json",
    "trainer auto",
    "trainer json offload",
    "trainer class",
    "trainer class alone",
    "accelerate json",
    "accelerate object",
    "accelerate object offload",
    "accelerate fsdp2",
]
ADAM_RUNS = ["trainer object unchecked", "adam 1", "adam 2", "adam 3"]


def launch(folder: Path, *command: Any) -> str:
    """Run a command in `folder` and return what it printed; fail with that if it fails."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    done = run_job(command, folder, environment, seconds=600)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> tuple[Path, str]:
    """Run every case in one launch; give the folder of its reports, and what it printed."""
    folder = tmp_path_factory.mktemp("clients")
    script = Path(__file__).with_name("clients_job.py")
    return folder, launch(folder, *DEEPSPEED, free_port(), WITHOUT_SHM, script, folder)


@pytest.fixture(scope="module")
def results(job) -> list[dict[str, Any]]:
    return [json.loads((job[0] / f"clients.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ADABELIEF_RUNS)
def test_adabelief_really_runs(results, case):
    for result in results:
        # float32 weights of about 0.3 are 3e-8 apart.
        assert result[case].get("moved") == pytest.approx(LR / BETAS[0], rel=1e-4), result[case]
        assert result[case]["warnings"] == []


@pytest.mark.parametrize("case", ADAM_RUNS)
def test_a_replaced_adabelief_is_noticed_without_being_asked(results, case):
    for rank, result in enumerate(results):
        # At most the first gradients are small beside Adam's eps of 1e-8, or weights decay.
        assert result[case].get("moved") == pytest.approx(LR, rel=1e-2), result[case]
        if rank == 0:
            (sentence,) = result[case]["warnings"]
            assert "AdamW trains the parameters that were given to AdaBelief" in sentence
        else:
            assert result[case]["warnings"] == []


def test_the_callback_stops_every_rank_and_says_why(results):
    for result in results:
        error = result["trainer object"]["error"]
        assert error.startswith("NotAdaBelief: AdamW runs instead of AdaBelief")
        assert "drops optimizers=(optimizer, None)" in error


def test_one_line_tells_what_runs(job):
    assert re.search(
        r"AdaBelief runs under DeepSpeedOptimizerWrapper > DeepSpeedZeroOptimizer \(ZeRO-2\) "
        r"on 2 ranks with the (cpp|eager) kernel, lr 0.01, eps 1e-30, "
        r"betas \(0.5, 0.9\), weight decay 0\n",
        job[1],
    )
    assert 'the DeepSpeed configuration names "adam" as its optimizer' in job[1]


def test_monitors_show_the_true_values(job, results):
    folder, _ = job
    assert "error" not in results[0]["monitored"]
    true = json.loads((folder / "true.json").read_text())
    samples = [8, 16, 24]
    for key, name in (("lr", "lr"), ("loss", "train_loss")):
        with (folder / "csv" / "job" / f"Train_Samples_{name}.csv").open() as file:
            rows = list(csv.reader(file))[1:]
        assert [int(row[0]) for row in rows] == samples
        assert [float(row[1]) for row in rows] == pytest.approx(true[key], rel=1e-6)

        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tb" / "job")).Reload()
        scalars = events.Scalars(f"Train/Samples/{name}")
        assert [event.step for event in scalars] == samples
        assert [event.value for event in scalars] == pytest.approx(true[key], rel=1e-6)


def test_timers_and_the_flops_profiler_report(job):
    folder, output = job
    assert re.search(r"time \(ms\) \| .*step", output)
    # One pass over 4 rows of a 5 x 3 layer: 60 multiplications and additions.
    assert re.search(r"fwd MACs per GPU:\s+60 MACs", (folder / "flops.txt").read_text())


def test_trainer_example(tmp_path):
    script = ROOT / "examples" / "with_trainer.py"
    output = launch(tmp_path, *DEEPSPEED, free_port(), WITHOUT_SHM, script, "--steps", 20)
    assert "DeepSpeedZeroOptimizer (ZeRO-2) on 2 ranks" in output
    loss = float(re.search(r"held-out loss ([\d.]+)", output)[1])
    assert loss < 4.5  # it starts at log(256) = 5.5


def test_accelerate_example(tmp_path):
    command = [BIN / "accelerate", "launch", "--use_deepspeed", "--deepspeed_config_file"]
    command += [ROOT / "configs" / "accelerate_zero2.json", "--num_processes", 2]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", free_port(), WITHOUT_SHM]
    output = launch(tmp_path, *command, ROOT / "examples" / "with_accelerate.py", "--steps", 20)
    assert "DeepSpeedZeroOptimizer (ZeRO-2) on 2 ranks" in output
    assert float(re.search(r"step 20: loss ([\d.]+)", output)[1]) < 4.5


def test_deepspeed_example(tmp_path):
    script = ROOT / "examples" / "with_deepspeed.py"
    config = ["--deepspeed", "--deepspeed_config", ROOT / "configs" / "digits.json"]
    command = [*DEEPSPEED, free_port(), WITHOUT_SHM, script, "--epochs", 2, *config]
    output = launch(tmp_path, *command)
    assert "AdaBelief runs under DeepSpeedEngine > DeepSpeedZeroOptimizer (ZeRO-2)" in output
    assert float(re.search(r"([\d.]+)% of 297 held-out digits", output)[1]) > 50  # chance is 10


@pytest.mark.parametrize("flags", [[], ["--fsdp2"]], ids=["ddp", "fsdp2"])
def test_lightning_example(tmp_path, flags):
    script = ROOT / "examples" / "with_lightning.py"
    output = launch(tmp_path, sys.executable, script, "--devices", 2, "--steps", 20, *flags)
    assert "AdaBelief runs under Trainer on 2 ranks" in output
    assert "betas (0.9, 0.999), weight decay 0.1 and 0\n" in output
    assert float(re.search(r"^loss ([\d.]+)", output, re.MULTILINE)[1]) < 4.5


def test_lightning_config_is_one_that_deepspeed_and_the_strategy_read():
    # Further than this its strategy does not go without CUDA.
    code = (
        "import torch; from deepspeed import DeepSpeedConfig; "
        "from lightning.pytorch.strategies import DeepSpeedStrategy; "
        "config = DeepSpeedStrategy(config='configs/lightning_zero2.json').config; "
        "read = DeepSpeedConfig(config); "
        "cls = getattr(torch.optim, read.optimizer_name); "
        "cls([torch.ones(1)], **read.optimizer_params); "
        "print(cls.__name__, read.zero_config.stage)"
    )
    assert launch(ROOT, sys.executable, "-c", code).endswith("AdaBelief 2\n")


def steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_verify_without_a_framework():
    model = nn.Linear(3, 2)
    running = belief_dist.verify(belief_dist.AdaBelief(model.parameters(), fused=False))
    assert str(running) == (
        "AdaBelief runs on 1 rank with the eager kernel, lr 0.001, eps 1e-16, "
        "betas (0.9, 0.999), weight decay 0"
    )
    with pytest.raises(belief_dist.NotAdaBelief, match=r"^AdamW runs instead of AdaBelief: pass"):
        belief_dist.verify(torch.optim.AdamW(model.parameters()))
    namesake = type("AdaBelief", (torch.optim.AdamW,), {"__module__": "timm.optim"})
    with pytest.raises(belief_dist.NotAdaBelief, match=r"^timm\.optim\.AdaBelief runs instead"):
        belief_dist.verify(namesake(model.parameters()))
    with pytest.raises(belief_dist.NotAdaBelief, match=r"^Linear holds no single optimizer"):
        belief_dist.verify(model)


def test_another_optimizer_on_the_same_parameters_is_reported_once(caplog):
    model = nn.Linear(3, 2)
    ours = belief_dist.AdaBelief(model.parameters())
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(other, model)
    steps(other, model)
    (record,) = caplog.records
    assert record.getMessage().startswith("SGD trains the parameters that were given to AdaBelief")
    steps(ours, model)


def test_no_false_alarm(caplog):
    model, another = nn.Linear(3, 2), nn.Linear(3, 2)
    belief_dist.AdaBelief(model.parameters())  # thrown away on purpose
    steps(torch.optim.SGD(model.parameters(), lr=0.1), model)
    ours = belief_dist.AdaBelief(model.parameters())
    steps(torch.optim.SGD(another.parameters(), lr=0.1), another)  # as in a GAN
    steps(ours, model)
    steps(torch.optim.SGD(model.parameters(), lr=0.1), model)  # both on purpose
    assert caplog.records == []
