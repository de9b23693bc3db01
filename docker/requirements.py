"""Prints what belief_dist and some of its extras require: `requirements.py EXTRA...`.

The images install that before the source is there, so that a changed source keeps the layer.
"""

import sys
from pathlib import Path

import tomllib

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
