"""`python -m belief_dist` is the command `belief-dist`."""

import sys

from _belief_dist_cli import main

if __name__ == "__main__":
    sys.exit(main())
