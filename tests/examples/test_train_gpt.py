"""The example job as users start it: trained, interrupted, resumed; nothing of it is faked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.paths import BIN, ROOT

SCRIPT = str(ROOT / "examples" / "train_gpt.py")
SMALL = (
    "--layers 1 --width 32 --heads 2 --context 32 --batch 8 --steps 6 --warmup 2 --eval_every 3 "
    "--save_every 100 --sample_bytes 20"
).split()

LAUNCHERS = {
    "deepspeed": [str(ROOT / "launch" / "local.sh"), "2"],
    "torchrun": [
        *[str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2"],
        *[SCRIPT, "--config", str(ROOT / "configs" / "gpt.yaml")],
    ],
    "python": [sys.executable, SCRIPT, "--config", str(ROOT / "configs" / "gpt.yaml")],
}


def start(launcher: str, folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Run a small job with `folder` as the current directory."""
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*LAUNCHERS[launcher], *SMALL, *settings],
        cwd=folder,
        env=environment,
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


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        ("deepspeed", ["--accumulate", "2"]),
        ("torchrun", ["--dtype", "bfloat16"]),
        ("python", []),
        ("deepspeed", zero(1)),
        ("torchrun", [*zero(2), "--dtype", "bfloat16", "--accumulate", "2"]),
        ("torchrun", zero(3)),
        ("python", zero(0)),
        ("deepspeed", [*zero("sharded"), "--dtype", "bfloat16", "--accumulate", "2"]),
    ],
    ids=[
        "deepspeed",
        "torchrun-bf16",
        "python",
        "deepspeed-zero1",
        "torchrun-zero2",
        "torchrun-zero3",
        "python-zero0",
        "deepspeed-sharded",
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    launcher: str, settings: list[str], tmp_path: Path
) -> None:
    """Losses, norms and learning rates are equal to the last digit, and all artefacts are there."""
    said = train(launcher, tmp_path, *settings, "--out", "whole")
    train(launcher, tmp_path, *settings, "--out", "parts", "--stop_at", "3")
    train(launcher, tmp_path, *settings, "--resume", "parts")

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert [row["step"] for row in rows(whole)] == [1, 2, 3, 4, 5, 6]
    assert rows(parts) == rows(whole)
    assert rows(whole)[-1]["loss"] < rows(whole)[0]["loss"]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in whole.glob("step-*")] == ["step-00000006"]
    for expected in ("exp_avg_sq", "unsharded", "unigram entropy", "A sample:\nThe "):
        assert expected in said


def test_states_are_sharded_and_the_table_says_so(tmp_path: Path) -> None:
    """Two ranks hold half of each state, up to padding."""
    said = train("torchrun", tmp_path, "--out", "run")
    (line,) = [line for line in said.splitlines() if "exp_avg_sq" in line]
    held, unsharded = (float(cell) for cell in line.replace("│", " ").split()[1:3])
    assert unsharded / 2 <= held <= unsharded / 2 + 0.001


def test_two_engines_train_alike(tmp_path: Path) -> None:
    """The same job by ShardedAdaBelief and by DeepSpeed at ZeRO-1: one rule, so one trajectory.

    Sums in another order differ in the last bits, which six small steps do not amplify much.
    """
    train("torchrun", tmp_path, "--out", "sharded")
    train("torchrun", tmp_path, "--out", "zero1", *zero(1))
    for ours, theirs in zip(rows(tmp_path / "sharded"), rows(tmp_path / "zero1"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["lr"] == theirs["lr"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["--batch", "5"], "batch must be a multiple of ranks x accumulate (1 x 2), got 5"),
        (["--heads", "3"], "width must be a multiple of twice the heads"),
        (["--stop_at", "0"], "stop_at must be at least 1"),
        (["--engine", "deepspeed"], "engine=deepspeed and deepspeed_config go together"),
        (
            [*zero(2)[:2], "--deepspeed_config", f"{ROOT}/configs/deepspeed_zero2_bf16.json"],
            "asks for bfloat16: pass --dtype bfloat16",
        ),
        (
            [*zero(2)[:2], "--deepspeed_config", "nowhere.json"],
            "deepspeed_config nowhere.json cannot be read",
        ),
        (["--learning", "1"], "--learning"),
        (["--optimizer.speed", "1"], "speed"),
        (["--resume", "nowhere"], "there is no checkpoint under nowhere"),
    ],
)
def test_wrong_settings_get_a_sentence_and_no_traceback(
    settings: list[str], expected: str, tmp_path: Path
) -> None:
    done = start("python", tmp_path, "--accumulate", "2", *settings)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_resumes_only_as_it_was_started(tmp_path: Path) -> None:
    """Other settings would be another run: refused, and nothing is touched."""
    train("torchrun", tmp_path, "--out", "run", "--stop_at", "3")
    before = rows(tmp_path / "run")
    other_seed = start("torchrun", tmp_path, "--resume", "run", "--seed", "2")
    assert "seed is 2 here, and the run in" in other_seed.stderr
    occupied = start("python", tmp_path, "--out", "run")
    assert "is not empty" in occupied.stderr
    assert other_seed.returncode and occupied.returncode
    assert rows(tmp_path / "run") == before


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """The same global batch, its gradients summed in other parts: rounding differs, no more."""
    train("torchrun", tmp_path, "--out", "whole")
    train("torchrun", tmp_path, "--out", "run", "--stop_at", "3")
    train("python", tmp_path, "--resume", "run")
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "run")
    assert parts[:3] == whole[:3] and len(parts) == len(whole)
    for ours, theirs in zip(parts[3:], whole[3:], strict=True):
        assert ours["lr"] == theirs["lr"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
