"""Wrap methods of another package in memory, at most once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# Called with the original method and then its arguments, the instance first.
Wrapper = Callable[..., Any]


def answer_once(instance: object, name: str, answer: Callable[..., Any]) -> None:
    """Replace a method of one object by `answer` for its next call only."""

    def once(*args: Any, **kwargs: Any) -> Any:
        delattr(instance, name)  # uncovers the method of the class
        return answer(*args, **kwargs)

    setattr(instance, name, once)


def wrap_method(owner: type, name: str, wrapper: Wrapper) -> None:
    """Replace `owner.name`, so that calls go to `wrapper(original, instance, ...)`.

    The wrapper must pass calls that do not concern this package on to `original`. Where another
    wrapper stands already, this one goes around it; the same one does so once.

    Args:
        owner: The class that defines the method.
        name: Name of the method.
        wrapper: Called in place of the method.
    """
    original = vars(owner)[name]
    standing = getattr(original, "belief_dist_wrappers", ())
    if wrapper in standing:
        return  # an earlier optimizer has asked for it

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.belief_dist_wrappers = (*standing, wrapper)  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
