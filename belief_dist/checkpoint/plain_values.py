"""Values beside tensors in the form in which a checkpoint holds them: read without running code.

`torch.load(weights_only=True)` reads Python's own types and no subclasses of them: a number that
NumPy computed, an enum or a namedtuple would be written, and never read again. They are converted
when they are saved, or refused then.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Types that are read as they were written. Subclasses become the first of these that fits.
_NUMBERS_AND_STRINGS = (bool, int, float, complex, str, bytes)
_OTHERS = (type(None), torch.dtype, torch.Size, torch.device)


def to_plain(value: Any, where: str) -> Any:
    """Return `value` in types that are read without running code, or refuse it.

    NumPy's numbers become Python's, members of an enum their values, namedtuples tuples, and
    dictionaries of other kinds (defaultdict, Counter) dicts. Tensors stay.

    Args:
        value: Numbers, strings, bytes, None, tensors, dtypes, and lists, tuples and mappings of
            them.
        where: Names it in the error, for example "extra['loss']".

    Raises:
        ValueError: It holds something else.
    """
    kind = type(value)
    if kind in _NUMBERS_AND_STRINGS or isinstance(value, (Tensor, *_OTHERS)):
        return value
    if isinstance(value, enum.Enum):
        return to_plain(value.value, where)
    if kind.__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return to_plain(value.item(), where)
    if isinstance(value, Mapping):
        pairs = [(to_plain(k, where), to_plain(v, where)) for k, v in value.items()]
        return OrderedDict(pairs) if kind is OrderedDict else dict(pairs)
    if isinstance(value, (list, tuple)):
        items = [to_plain(item, where) for item in value]
        return items if isinstance(value, list) else tuple(items)
    for base in _NUMBERS_AND_STRINGS:
        if isinstance(value, base):
            construct: Callable[[Any], Any] = base
            return construct(value)
    hint = "; torch.from_numpy makes a tensor of it" if kind.__module__ == "numpy" else ""
    raise ValueError(
        f"{where} holds a {kind.__name__}; a checkpoint takes None, numbers, strings, bytes, "
        f"tensors, and lists, tuples and dicts of them{hint}."
    )


def plain_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a user gave as `extra`, in plain types.

    Raises:
        ValueError: A key is no string, or a value cannot be saved.
    """
    for key in extra:
        if not isinstance(key, str):
            raise ValueError(f"the keys of extra must be strings, got {key!r}.")
    return {str(key): to_plain(value, f"extra[{key!r}]") for key, value in extra.items()}
