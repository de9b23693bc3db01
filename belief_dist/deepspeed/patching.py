"""Puts functions around a method of another package, in memory and each at most once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# Takes the method as it was and all arguments, the instance first.
Around = Callable[..., Any]


def answer_once(instance: object, name: str, answer: Callable[..., Any]) -> None:
    """Have `answer` stand in for a method of one object in its next call, and only in that."""

    def once(*args: Any, **kwargs: Any) -> Any:
        delattr(instance, name)  # the instance's, so that the class's is back
        return answer(*args, **kwargs)

    setattr(instance, name, once)


def extend_method(owner: type, name: str, around: Around) -> None:
    """Have `around(original, instance, ...)` answer calls of `owner.name`.

    Everything that does not concern this package is for `around` to hand on to `original`. Where
    another wrapper stands already, this one goes around it; the same one does so once.

    Args:
        owner: The class that defines the method.
        name: Of the method.
        around: What answers instead.
    """
    original = vars(owner)[name]
    standing = getattr(original, "belief_dist_wrappers", ())
    if around in standing:
        return

    @functools.wraps(original)
    def extended(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    extended.belief_dist_wrappers = (*standing, around)  # type: ignore[attr-defined]
    setattr(owner, name, extended)
