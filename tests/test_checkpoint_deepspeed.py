"""Checkpoints of DeepSpeed: read at every stage, written as universal ones, loaded by it again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from belief_dist.checkpoint import convert
from belief_dist.checkpoint.whole import read_whole
from deepspeed_checkpoint_job import WORLD_SIZE
from test_deepspeed import free_port

JOB = Path(__file__).with_name("deepspeed_checkpoint_job.py")


def environment(folder: Path) -> dict[str, str]:
    bin_dir = Path(sys.executable).parent
    return os.environ | {
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
    }


def start(folder: Path, *command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def launch(folder: Path) -> None:
    launcher = Path(sys.executable).parent / "deepspeed"
    options = ["--num_accelerators", str(WORLD_SIZE), "--master_addr", "127.0.0.1"]
    start(folder, launcher, *options, "--master_port", str(free_port()), JOB, folder)


def to_universal(folder: Path, tag: Path) -> Path:
    made = tag.with_name("universal")
    flags = ["--input_folder", str(tag), "--output_folder", str(made), "--inject_missing_state"]
    start(folder, sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *flags)
    return made


def test_zero_and_universal(tmp_path: Path) -> None:
    launch(tmp_path)
    for name in ("1fp32", "2bf16", "3fp32"):
        tag = tmp_path / name / "at3"
        with pytest.raises(ValueError, match=r"whose pickles can run any code; pass trust=True"):
            convert.read(tag)
        whole = convert.read(tag, trust=True)
        assert set(whole.steps.values()) == {3} == {whole.step}
        assert [group["options"]["weight_decay"] for group in whole.groups] == [0.0, 0.0]
        template = to_universal(tmp_path, tag)
        universal = convert.read(template, trust=True)
        assert not [s for s in convert.differences(whole, universal) if "options" not in s]

        # Through a checkpoint of ours into a template whose numbers are spoilt, and back to it.
        for file in template.glob("zero/*/*.pt"):
            saved = torch.load(file, weights_only=False)
            if isinstance(saved, dict) and "param" in saved:
                torch.save({**saved, "param": torch.zeros_like(saved["param"])}, file)
        convert.write(whole, tmp_path / "ours" / name, "belief_dist")
        ours = read_whole(tmp_path / "ours" / name)
        assert not convert.differences(whole, ours)
        again = tmp_path / "again" / name
        again.mkdir(parents=True)
        convert.write(ours, again / "universal", "universal", template=template)
        (again / "latest_universal").write_text("universal")
        written = convert.read(again / "universal", trust=True)
        assert not [s for s in convert.differences(whole, written) if "options" not in s]
        shutil.rmtree(template)
    launch(tmp_path)
    for name in ("1fp32", "2bf16", "3fp32"):
        files = [tmp_path / f"{name}.{kind}.0.pt" for kind in ("whole", "again")]
        expected, found = (torch.load(file) for file in files)
        for key, value in expected.items():
            assert torch.equal(value, found[key]), f"{name}: {key}"
