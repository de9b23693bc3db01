"""The example job as users start it: trained, interrupted, resumed; nothing of it is faked.

Launchers start some runs; of many settings the ranks are forks, which saves their imports.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from belief_dist.checkpoint.formats.full_state import read_full_state
from belief_dist.telemetry import read_records
from belief_dist.telemetry.report import write_report
from tests.harness.forked import PRELOADED, Job, run_all_forked, run_forked
from tests.harness.paths import BIN, ROOT

SCRIPT = str(ROOT / "examples" / "train_gpt.py")
SMALL = (
    "--layers 1 --width 32 --heads 2 --context 32 --batch 8 --steps 6 --warmup 2 --eval_every 3 "
    "--save_every 100 --sample_bytes 20"
).split()

CONFIG = ["--config", str(ROOT / "configs" / "gpt.yaml")]

LAUNCHERS = {
    "deepspeed": [str(ROOT / "launch" / "local.sh"), "2"],
    "torchrun": [
        *[str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2"],
        *[SCRIPT, *CONFIG],
    ],
    "python": [sys.executable, SCRIPT, *CONFIG],
}


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def start(launcher: str, folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Run a small job with `folder` as the current directory."""
    return subprocess.run(
        [*LAUNCHERS[launcher], *SMALL, *settings],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )


def train(launcher: str, folder: Path, *settings: str) -> str:
    """Run a small job that must succeed; return what it printed."""
    done = start(launcher, folder, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the log of a run without its timings, which no two runs share."""
    read = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read]


def zero(stage: int | str) -> list[str]:
    name = stage if stage == "sharded" else f"zero{stage}"
    config = ROOT / "configs" / f"deepspeed_{name}.json"
    return ["--engine", "deepspeed", "--deepspeed_config", str(config)]


# By how many ranks, and with what settings.
RESUMED = {
    "accumulate": (2, ["--accumulate", "2"]),
    "bf16": (2, ["--dtype", "bfloat16"]),
    "zero0": (1, zero(0)),
    "zero2": (2, [*zero(2), "--dtype", "bfloat16", "--accumulate", "2"]),
    "zero3": (2, zero(3)),
    "deepspeed-sharded": (2, [*zero("sharded"), "--dtype", "bfloat16", "--accumulate", "2"]),
}
Started = Callable[..., tuple[Path, str]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Started:
    """Give a function (launcher, *settings) -> a run's folder, and what was printed."""

    @functools.cache
    def started(launcher: str, *settings: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("whole")
        said = train(launcher, folder, *settings, "--out", "whole")
        return folder / "whole", said

    return started


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a run of two ranks that has ended after half of its steps; tests copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    train("torchrun", folder, "--out", "run", "--stop_at", "3")
    return folder / "run"


def check_resumed(whole: Path, parts: Path, said: str) -> None:
    """Losses, norms and learning rates are equal to the last digit, and all artefacts are there."""
    assert [row["step"] for row in rows(whole)] == [1, 2, 3, 4, 5, 6]
    assert rows(parts) == rows(whole)
    assert rows(whole)[-1]["loss"] < rows(whole)[0]["loss"]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in whole.glob("step-*")] == ["step-00000006"]
    for expected in ("exp_avg_sq", "unsharded", "unigram entropy", "A sample:\nThe "):
        assert expected in said


def interrupt(launcher: str, folder: Path, number: signal.Signals, *settings: str) -> int:
    """Send a signal to all processes of a job when it begins, as a terminal and Slurm do."""
    with subprocess.Popen(
        [*LAUNCHERS[launcher], *SMALL, *settings],
        cwd=folder,
        env=environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as job:
        assert job.stdout is not None
        began = next((line for line in job.stdout if "from step 0, " in line), None)
        os.killpg(job.pid, number)
        said = job.stdout.read()
        status = job.wait(timeout=60)
    assert began is not None, said
    (line,) = [line for line in said.splitlines() if line.startswith("train_gpt.py: ")]
    (saved,) = (folder / "parts").glob("step-*")
    after = f"after step {int(saved.name.removeprefix('step-'))}, which is saved; --resume "
    assert f"ended by {number.name} {after}{folder / 'parts'} goes on" in line
    assert len(rows(folder / "parts")) == int(saved.name[-8:]) < 6
    assert (folder / "parts" / "loss.png").exists()
    return status


@pytest.mark.parametrize(
    ("launcher", "settings", "number", "status"),
    # The launcher has a status of its own.
    [("deepspeed", zero(1), signal.SIGINT, 1), ("python", [], signal.SIGTERM, 143)],
    ids=["deepspeed-zero1", "python"],
)
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(
    launcher: str,
    settings: list[str],
    number: signal.Signals,
    status: int,
    uninterrupted: Started,
    tmp_path: Path,
) -> None:
    whole, said = uninterrupted(launcher, *settings)
    assert interrupt(launcher, tmp_path, number, *settings, "--out", "parts") == status
    train(launcher, tmp_path, "--resume", "parts")  # with the settings that the run has stored
    check_resumed(whole, tmp_path / "parts", said)


def test_every_engine_resumes_what_it_has_saved(tmp_path: Path) -> None:
    """Three jobs each: whole, stopped, and resumed by new processes."""
    jobs = []
    for name, (ranks, settings) in RESUMED.items():
        for more in (
            ["--out", f"{name}.whole"],
            ["--out", f"{name}.parts", "--stop_at", "3"],
            ["--resume", f"{name}.parts"],
        ):
            jobs.append(Job(ranks, [*CONFIG, *SMALL, *settings, *more]))
    said = run_all_forked(Path(SCRIPT), tmp_path, jobs)
    for name, whole in zip(RESUMED, said[::3], strict=True):
        check_resumed(tmp_path / f"{name}.whole", tmp_path / f"{name}.parts", whole)


def test_states_are_sharded_and_the_table_says_so(uninterrupted: Started) -> None:
    """Two ranks hold half of each state, up to padding."""
    _, said = uninterrupted("torchrun")
    (line,) = [line for line in said.splitlines() if "exp_avg_sq" in line]
    held, unsharded = (float(cell) for cell in line.replace("│", " ").split()[1:3])
    assert unsharded / 2 <= held <= unsharded / 2 + 0.001


def test_two_engines_train_alike(uninterrupted: Started) -> None:
    """The same job by ShardedAdaBelief and by DeepSpeed at ZeRO-1: one rule, so one trajectory.

    Sums in another order differ in the last bits, which six small steps do not amplify much.
    """
    sharded, _ = uninterrupted("torchrun")
    zero1, _ = uninterrupted("deepspeed", *zero(1))
    for ours, theirs in zip(rows(sharded), rows(zero1), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["lr"] == theirs["lr"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_numbered_micro_batches_train_alike_at_any_number_of_ranks(tmp_path: Path) -> None:
    """Weights, states, losses, norms: of one rank, and of a run by 4, then 3, then 2 ranks."""
    jobs = [
        Job(1, ["--out", "whole"]),
        Job(4, ["--out", "changing", "--stop_at", "2"]),
        Job(3, ["--resume", "changing", "--stop_at", "4"]),
        Job(2, ["--resume", "changing"]),
    ]
    settings = [*CONFIG, *SMALL, "--micro_batches", "8"]
    preloaded = [name for name in PRELOADED if name != "deepspeed"]
    jobs = [job._replace(arguments=[*settings, *job.arguments]) for job in jobs]
    run_all_forked(Path(SCRIPT), tmp_path, jobs, preloaded=preloaded)

    def found(run: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        (folder,) = (tmp_path / run).glob("step-*")
        state = read_full_state(folder)
        found = state.weights | {
            f"{name}.{key}": value
            for name, own in state.states.items()
            for key, value in own.items()
        }
        log = rows(tmp_path / run)
        for row in log:  # ranks evaluate in batches of their own
            row.pop("held_out_loss", None)
        return found, log

    tensors, seen = found("whole")
    assert len(tensors) > 20 and len(seen) == 6
    others, theirs = found("changing")
    assert theirs == seen
    assert others.keys() == tensors.keys()
    assert all(torch.equal(others[key], value) for key, value in tensors.items())


WRONG = {
    "batch must be a multiple of ranks x accumulate (1 x 2), got 5": ["--batch", "5"],
    "width must be a multiple of twice the heads": ["--heads", "3"],
    "stop_at must be at least 1": ["--stop_at", "0"],
    "engine=deepspeed and deepspeed_config go together": ["--engine", "deepspeed"],
    "asks for bfloat16: pass --dtype bfloat16": [
        *[*zero(2)[:2], "--deepspeed_config", f"{ROOT}/configs/deepspeed_zero2_bf16.json"]
    ],
    "deepspeed_config nowhere.json cannot be read": [
        *[*zero(2)[:2], "--deepspeed_config", "nowhere.json"]
    ],
    "AdaBeleif is not a supported DeepSpeed Optimizer (belief-dist check": [
        *[*zero(2)[:2], "--deepspeed_config", "misspelled.json"]
    ],
    "--learning": ["--learning", "1"],
    "speed": ["--optimizer.speed", "1"],
    "batch must be a multiple of micro_batches, which": ["--micro_batches", "3"],
    "leave --optimizer.micro_batches out": ["--optimizer.micro_batches", "4"],
    "micro_batches takes the place of accumulate": ["--micro_batches", "4"],
    "there is no checkpoint under nowhere": ["--resume", "nowhere"],
}


def test_wrong_settings_get_a_sentence_and_no_traceback(tmp_path: Path) -> None:
    misspelled = {"optimizer": {"type": "AdaBeleif"}, "zero_optimization": {"stage": 2}}
    (tmp_path / "misspelled.json").write_text(json.dumps(misspelled))
    jobs = [
        Job(1, [*CONFIG, *SMALL, "--accumulate", "2", *settings]) for settings in WRONG.values()
    ]
    for expected, done in zip(WRONG, run_forked(Path(SCRIPT), tmp_path, jobs), strict=True):
        assert done.returncode == 2, expected
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_an_interrupted_run_says_how_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("train_gpt")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "auto_cli", interrupt)
    with pytest.raises(SystemExit) as left:
        example.main()
    assert left.value.code == 130
    assert "interrupted; --resume with the run's folder" in capsys.readouterr().err


def test_the_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows within a moment is of the first, and so is SIGTERM, which launchers send."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    stopping = importlib.import_module("gpt.stopping")
    child = os.fork()
    if child == 0:
        request = stopping.StopRequest()
        request.listen()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        seen = stopping.agreed_signal(3 * request.votes(torch.device("cpu")))
        if seen == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT
    assert stopping.agreed_signal(torch.tensor([0.0, 0.0])) is None
    assert stopping.agreed_signal(torch.tensor([0.0, 1.0])) == signal.SIGTERM


def test_a_run_resumes_only_as_it_was_started(stopped: Path, tmp_path: Path) -> None:
    """Other settings would be another run: refused, and nothing is touched."""
    shutil.copytree(stopped, tmp_path / "run")
    before = rows(stopped)
    other_seed = start("torchrun", tmp_path, "--resume", "run", "--seed", "2")
    assert "seed is 2 here, and the run in" in other_seed.stderr
    occupied = start("python", tmp_path, "--out", "run")
    assert "is not empty" in occupied.stderr
    assert other_seed.returncode and occupied.returncode
    assert rows(tmp_path / "run") == before


def test_a_run_goes_on_with_another_number_of_ranks(
    stopped: Path, uninterrupted: Started, tmp_path: Path
) -> None:
    """The same global batch, its gradients summed in other parts: rounding differs, no more."""
    shutil.copytree(stopped, tmp_path / "run")
    train("python", tmp_path, "--resume", "run")
    whole, parts = rows(uninterrupted("torchrun")[0]), rows(tmp_path / "run")
    assert parts[:3] == whole[:3] and len(parts) == len(whole)
    for ours, theirs in zip(parts[3:], whole[3:], strict=True):
        assert ours["lr"] == theirs["lr"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_records_of_the_optimizer_and_their_page(tmp_path: Path) -> None:
    train("python", tmp_path, "--out", "run", "--monitor_every", "2")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6]
    logged = rows(tmp_path / "run")
    for record in records:
        row = logged[record["step"] - 1]
        assert record["lr/group0"] == row["lr"]
        assert record["l2_norm/grad/global"] == row["grad_norm"]
        assert record["loss"] == pytest.approx(row["loss"])
    pytest.importorskip("matplotlib")
    page, _ = write_report(tmp_path / "run")
    assert "checkpoint step-00000006" in page.read_text()
