"""All experiments, in the order in which `run all` does them."""

from __future__ import annotations

from examples.evidence.direction import DIRECTION
from examples.evidence.images import FASHION, FEW
from examples.evidence.study import Study
from examples.evidence.toys import TOYS, TUNED_TOYS

STUDIES: dict[str, Study] = {
    study.name: study for study in (TOYS, TUNED_TOYS, DIRECTION, FASHION, FEW)
}
