"""Run a script with AdaBelief registered, where torch does not do that by itself.

`deepspeed --module belief_dist.run train.py ARGS` does the same as `deepspeed train.py ARGS` (and
likewise under torchrun or python), except that it imports belief_dist first. It is needed where
torch's autoload is off (TORCH_DEVICE_BACKEND_AUTOLOAD=0) or the package is on PYTHONPATH only.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

import belief_dist  # noqa: F401  (registers the names with torch.optim)

_USAGE = "usage: python -m belief_dist.run [--local_rank=N] (SCRIPT | -m MODULE) [ARGS ...]"


def main(arguments: Sequence[str]) -> None:
    """Run a script or module as `python` would, with its own __main__, sys.argv and sys.path.

    Args:
        arguments: The script and its arguments. The deepspeed launcher puts `--local_rank=N`
            before the script, which then receives it as its first argument, as usual.

    Raises:
        SystemExit: There is nothing to run (status 2), or the script exits.
    """
    rest = list(arguments)
    passed_on = []
    while rest and rest[0].startswith(("--local_rank=", "--local-rank=")):
        passed_on.append(rest.pop(0))
    as_module = rest[:1] == ["-m"]
    if as_module:
        del rest[0]
    if not rest or rest[0].startswith("-"):
        print(_USAGE, file=sys.stderr)
        raise SystemExit(2)
    target, *script_arguments = rest
    sys.argv = [target, *passed_on, *script_arguments]
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    if not os.path.exists(target):
        print(f"belief_dist.run: there is no script {target!r} in {os.getcwd()}", file=sys.stderr)
        raise SystemExit(2)
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11's -P
        sys.path[0] = os.path.dirname(os.path.realpath(target))
    runpy.run_path(os.path.abspath(target), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
