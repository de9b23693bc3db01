"""What each command of `belief-dist` does, after `_belief_dist_cli` has read the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from _belief_dist_cli import PROGRAM, fail
from belief_dist.checkpoint import CheckpointError
from belief_dist.commands import checkpoints, machine, training_files


def run(action: str, arguments: Mapping[str, Any]) -> int:
    """Run a command with its arguments, and return its exit status: 0, 1, or 2 after an error."""
    try:
        status = ACTIONS[action](**arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough; Python would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (CheckpointError, ValueError, OSError) as error:
        return fail(PROGRAM, str(error))
    except Exception as error:
        # Files of others can be wrong in more ways than are told apart.
        return fail(
            PROGRAM,
            f"{action} fails, because what it reads is damaged or of another kind: "
            f"{type(error).__name__}: {error}",
        )
    return status


ACTIONS: dict[str, Callable[..., int]] = {
    "doctor": machine.doctor,
    "plan": machine.plan,
    "bench": machine.bench,
    "check": training_files.check,
    "migrate": training_files.migrate,
    "report": training_files.report,
    "inspect": checkpoints.inspect,
    "verify": checkpoints.verify,
    "diff": checkpoints.diff,
    "convert": checkpoints.convert,
}
