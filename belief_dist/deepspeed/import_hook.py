"""Calls functions once another package has been imported, and imports it never itself."""

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

    Whoever imports it, and whenever; again, should it be imported anew. The same call is made once,
    however often it is asked for. Where the package never comes, nothing happens.

    Args:
        package: A top-level one. The call follows its `__init__`, before any code of the importer.
        function: Must not raise: that would be an error of the import.
        args: Its arguments; hashable.
    """
    if sys.modules.get(package) is not None:
        importlib.import_module(package)  # waits where another thread is still at it
        function(*args)
        return
    finder = _finders.get(package)
    if finder is None:
        finder = _finders[package] = _Finder(package)
        sys.meta_path.insert(0, finder)
    finder.calls[function, args] = None


class _Finder:
    """Finds nothing itself, but lets the loader that another one found say when it has loaded."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._asks_others = False
        self.calls: dict[tuple[Callable[..., None], tuple[Any, ...]], None] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Be a finder of `sys.meta_path`; None leaves a module to the next one."""
        if name != self._package or self._asks_others:
            return None
        self._asks_others = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asks_others = False
        if spec is not None and spec.loader is not None:  # else a folder without code
            spec.loader = _Loader(spec.loader, self._call)
        return spec

    def _call(self) -> None:
        for function, args in list(self.calls):
            function(*args)


_finders: dict[str, _Finder] = {}


class _Loader(importlib.abc.Loader):
    """Does what another loader does, and then makes a call."""

    def __init__(self, loader: importlib.abc.Loader, call: Callable[[], None]) -> None:
        self._loader = loader
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # what there is beside the two methods below

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # nobody needs to know
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._call()
