"""Checkpoints of DeepSpeed: read at every stage, written as universal ones, loaded by it again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from belief_dist.checkpoint.formats import convert
from belief_dist.checkpoint.formats.full_state import FullState, read_full_state
from tests.harness.forked import Job, run_all_forked
from tests.harness.launch import launch
from zero_checkpoints_job import CASES, WORLD_SIZE

JOB = Path(__file__).with_name("zero_checkpoints_job.py")


def check_resumed(folder: Path, source: str, ranks: int, name: str, saved: FullState) -> None:
    """Compare what was loaded, bit for bit, and what was trained from there."""
    resumed = folder / f"resumed-{source}-{ranks}" / name
    loaded = convert.read(resumed / "at3", trust=True)
    assert convert.differences(saved, loaded) == [], (name, ranks)
    before = torch.load(folder / "saved" / name / "found.pt")
    after = torch.load(resumed / "found.pt")
    assert after["options"] == before["options"], (name, ranks)
    for key, value in before["masters"].items():
        if ranks == WORLD_SIZE:
            assert torch.equal(after["masters"][key], value), (name, key)
            continue
        # Other ranks add gradients in another order: rounding, of bfloat16 ones to 8 bits.
        atol = 2e-2 if "bf16" in name else 1e-5
        torch.testing.assert_close(after["masters"][key], value, rtol=0, atol=atol)


def test_zero_and_universal(tmp_path: Path) -> None:
    launch(tmp_path, job=[JOB], world_size=WORLD_SIZE)
    names = [f"{stage}{dtype}" for stage, dtype in CASES]
    wholes = {}
    for name in names:
        folder = tmp_path / "saved" / name
        with pytest.raises(ValueError, match=r"whose pickles can run any code; pass trust=True"):
            convert.read(folder / "at3")
        whole = wholes[name] = convert.read(folder / "at3", trust=True)
        assert set(whole.steps.values()) == {3} == {whole.step}
        options = [group["options"] for group in whole.groups]
        assert {o["weight_decay"]: o["lr"] for o in options} == {
            0.1: 0.02 / 8,
            0.05: 0.01 / 8,
            0.0: 0.005 / 8,
        }
        found = torch.load(folder / "found.pt")
        for key, value in found["zero_to_fp32"].items():
            assert torch.equal(whole.weights[key], value), f"{name}: {key}"
        universal = convert.read(folder / "universal", trust=True)
        assert convert.differences(whole, universal) == []

        # One file with the whole optimizer state.
        convert.write(whole, tmp_path / f"{name}.pt", "torch")
        assert len(torch.load(tmp_path / f"{name}.pt")["state"]) == len(whole.names)

        # Through a checkpoint of ours into a template whose numbers are spoilt, and back to it.
        template = tmp_path / "template" / name
        shutil.copytree(folder / "universal", template)
        for file in template.glob("zero/*/*.pt"):
            saved = torch.load(file, weights_only=False)
            if isinstance(saved, dict) and "param" in saved:
                torch.save({**saved, "param": torch.zeros_like(saved["param"])}, file)
        convert.write(whole, tmp_path / "ours" / name, "belief_dist")
        ours = read_full_state(tmp_path / "ours" / name)
        assert convert.differences(whole, ours) == []
        again = tmp_path / "again" / name
        again.mkdir(parents=True)
        convert.write(ours, again / "universal", "universal", template=template)
        (again / "latest_universal").write_text("universal")
        written = convert.read(again / "universal", trust=True)
        assert convert.differences(whole, written) == []
    resumed = [("again", 2), ("saved", 1), ("saved", 3), ("saved", 4)]
    run_all_forked(JOB, tmp_path, [Job(ranks, [tmp_path, source]) for source, ranks in resumed])
    for source, ranks in resumed:
        for name in names:
            check_resumed(tmp_path, source, ranks, name, wholes[name])
