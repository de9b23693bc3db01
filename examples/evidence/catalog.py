"""All experiments, in the order in which `run all` does them."""

from __future__ import annotations

from examples.evidence.adversarial import GAN
from examples.evidence.direction import DIRECTION
from examples.evidence.gpt import GPT
from examples.evidence.images import FASHION, FEW, FEW_PLAIN
from examples.evidence.lstm import LSTM
from examples.evidence.settings_images import SETTINGS_IMAGES
from examples.evidence.settings_text import SETTINGS_TEXT
from examples.evidence.study import Study
from examples.evidence.toys import TOYS, TUNED_TOYS

PAGE = (TOYS, TUNED_TOYS, DIRECTION)
_PAPER = (FASHION, FEW, FEW_PLAIN, LSTM, GPT, GAN)
_SETTINGS = (SETTINGS_TEXT, SETTINGS_IMAGES)
STUDIES: dict[str, Study] = {study.name: study for study in (*PAGE, *_PAPER, *_SETTINGS)}
