"""Call functions when another package has been imported, without importing it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(package: str, function: Callable[..., None], *args: Any) -> None:
    """Call `function(*args)` now if `package` has been imported, and else as soon as it has.

    The call is repeated if the package is imported again. Requesting the same call several times
    has no effect. If the package is never imported, nothing happens.

    Args:
        package: A top-level package. The call is made after its `__init__` has run, before the
            importing code goes on.
        function: Must not raise, as the import would fail.
        args: Its arguments; hashable.
    """
    if sys.modules.get(package) is not None:
        importlib.import_module(package)  # waits if another thread is still importing it
        function(*args)
        return
    finder = _finders.get(package)
    if finder is None:
        finder = _finders[package] = _Finder(package)
        sys.meta_path.insert(0, finder)
    finder.calls[function, args] = None


class _Finder:
    """Wraps the loader that another finder returns, to be called when it has loaded."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._delegating = False
        self.calls: dict[tuple[Callable[..., None], tuple[Any, ...]], None] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Implement a finder of `sys.meta_path`; None leaves a module to the next finder."""
        if name != self._package or self._delegating:
            return None
        self._delegating = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._delegating = False
        if spec is not None and spec.loader is not None:  # None for a namespace package
            spec.loader = _Loader(spec.loader, self._call)
        return spec

    def _call(self) -> None:
        for function, args in list(self.calls):
            function(*args)


_finders: dict[str, _Finder] = {}


class _Loader(importlib.abc.Loader):
    """Delegates to another loader, and makes a call when the module has been executed."""

    def __init__(self, loader: importlib.abc.Loader, call: Callable[[], None]) -> None:
        self._loader = loader
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # optional methods, such as get_source

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            # Later users of the module's spec get the original loader.
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._call()
