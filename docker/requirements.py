"""Prints what belief_dist and some of its extras require: `requirements.py EXTRA...`.

The images install that before the source is there, so that a changed source keeps the layer.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = [project["optional-dependencies"][extra] for extra in sys.argv[1:]]
print(*project["dependencies"], *sum(extras, []), sep="\n")
