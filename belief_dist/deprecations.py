"""Former spellings still work, and say once in a process what they are spelled now."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_once(sentence: str, stacklevel: int) -> None:
    """Warn, the first time that a sentence is given.

    Args:
        sentence: What is spelled otherwise now.
        stacklevel: As for `warnings.warn` in the function that calls this one.
    """
    warnings.warn(sentence, FutureWarning, stacklevel=stacklevel + 1)
