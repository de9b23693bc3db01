"""Runs a script as `python SCRIPT ...` would, without the operation that DeepSpeed compiles first.

It takes 25 to 100 seconds to build and serves inference only.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
del sys.argv[0]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
