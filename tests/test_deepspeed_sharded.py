"""ShardedAdaBelief in DeepSpeed's engine, under its launcher; see `deepspeed_sharded_job.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from deepspeed_sharded_job import PARTS
from test_deepspeed import free_port

JOB = Path(__file__).with_name("deepspeed_sharded_job.py")


def launch(folder: Path, world_size: int, part: str) -> None:
    """Run a part of the job, which must end well on every rank, with all of its cases."""
    bin_dir = Path(sys.executable).parent
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
    }
    command = [bin_dir / "deepspeed", "--num_accelerators", str(world_size)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), JOB, folder, part]
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for rank in range(world_size):
        cases = json.loads((folder / f"{part}.{rank}.json").read_text())
        assert cases == [case.__name__ for case in PARTS[part]]


def test_engine_on_3_ranks_then_on_2_then_on_3(tmp_path: Path) -> None:
    """Three ranks train every case and save; two resume that and save; three resume theirs."""
    launch(tmp_path, 3, "train")
    launch(tmp_path, 2, "resume")
    launch(tmp_path, 3, "back")
