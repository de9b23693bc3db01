"""`python -m belief_dist.cli` is the command `belief-dist`, also on the ranks of a launcher."""

import sys

from _belief_dist_cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
