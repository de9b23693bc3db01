"""A CUDA graph without CUDA: what a step asks for is recorded, and done again on the same memory.

As in a captured graph, a replay runs no Python of the package: every operation and kernel works
again on the tensors of the recording, with the numbers that the host had then. Other than a capture
the recording itself runs, so it is the first replay as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._pytree import tree_flatten

from belief_dist import async_device
from tests.harness.device_path import Queue, is_launch


class Recording(Queue):
    """Records what is asked for while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._work: list[Callable[[], object]] = []

    def operation(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        found = func(*args, **kwargs)
        if is_launch(func):
            places = _tensors(found)

            def again() -> None:
                # What was changed in place comes back as the same tensor.
                for place, new in zip(places, _tensors(func(*args, **kwargs)), strict=True):
                    if new is not place:
                        place.copy_(new)

            self._work.append(again)
        return found

    def kernel(self, name: str, run: Callable[[], None]) -> None:
        self._work.append(run)
        run()

    def replay(self) -> None:
        for each in self._work:
            each()


def _tensors(found: Any) -> list[Tensor]:
    return [each for each in tree_flatten(found)[0] if isinstance(each, Tensor)]


@contextmanager
def recording() -> Iterator[Recording]:
    """Inside, everything is recorded, and the package believes that a graph is captured."""
    with patch.object(async_device, "is_capturing", lambda device: True), Recording() as graph:
        yield graph
