"""Ctrl-C and SIGTERM: the step under way is finished and saved, on all ranks alike."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# One Ctrl-C may come twice: from the terminal, and from a launcher that passes it on.
_SECONDS_OF_ONE = 0.3


class StopRequest:
    """The first of the signals that this rank has got while it listens, if any."""

    def __init__(self) -> None:
        self._first: int | None = None

    def listen(self) -> None:
        """From now on note Ctrl-C and SIGTERM instead of ending by them.

        An elastic job notes Ctrl-C alone: by SIGTERM torchrun ends ranks that wait for one that is
        gone, and starts them anew.
        """
        signal.signal(signal.SIGINT, self._note)
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
            signal.signal(signal.SIGTERM, self._note)

    def leave(self) -> None:
        """From now on end by them again."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def votes(self, device: torch.device) -> torch.Tensor:
        """Return (2,): 1 for the signal that has come, to be added up over all ranks."""
        return torch.tensor([float(self._first == each) for each in _SIGNALS], device=device)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # What follows the first is of the same Ctrl-C, or a launcher's SIGTERM behind it.
        if self._first is not None:
            return
        self._first = number
        time.sleep(_SECONDS_OF_ONE)
        # The next Ctrl-C ends the process at once, also while it waits for another rank.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def agreed_signal(votes: torch.Tensor) -> signal.Signals | None:
    """Return which signal ends the job, the same on all ranks, from the sum of their votes."""
    return next((each for each, count in zip(_SIGNALS, votes.tolist(), strict=True) if count), None)
