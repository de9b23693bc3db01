"""The command line of `belief-dist`: what may be said, without the code that does it.

Importing anything below belief_dist imports torch, which takes seconds. So this package lies beside
it, and imports it when a command runs: help, completion and wrong command lines are answered at
once. `rich` is imported where a terminal is to show something.
"""

from _belief_dist_cli import checkpoints, machine, training_files  # noqa: F401  (commands)
from _belief_dist_cli.app import PROGRAM, app, fail, main

__all__ = ["PROGRAM", "app", "fail", "main"]
