"""All experiments, in the order in which `run all` does them."""

from __future__ import annotations

from examples.evidence.images import FASHION, FEW
from examples.evidence.study import Study

STUDIES: dict[str, Study] = {study.name: study for study in (FASHION, FEW)}
