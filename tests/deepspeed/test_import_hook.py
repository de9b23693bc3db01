"""A call after another package's import: whoever imports it, in whatever order, or never."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from belief_dist.deepspeed import import_hook

NAME = "belief_dist_test_package"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the `__init__.py` of a package that nobody has imported yet."""
    file = tmp_path / NAME / "__init__.py"
    file.parent.mkdir()
    file.write_text("from . import part\nloaded = True\n")
    (file.parent / "part.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    monkeypatch.setattr(import_hook, "_finders", {})
    yield file
    for name in [NAME, f"{NAME}.part"]:
        sys.modules.pop(name, None)


@pytest.fixture
def look() -> Callable[[], None]:
    """Give a function that notes in `look.seen` what it finds imported when it is called."""

    def look() -> None:
        assert sys.modules[NAME].loaded
        look.seen.append(sys.modules[f"{NAME}.part"].value)

    look.seen = []
    return look


def test_called_once_and_after_the_import(package, look):
    for _ in range(3):
        import_hook.when_imported(NAME, look)
    assert NAME not in sys.modules
    assert importlib.util.find_spec(NAME) is not None  # as frameworks ask what is installed
    assert look.seen == []
    importlib.import_module(f"{NAME}.part")
    assert look.seen == [3]
    import_hook.when_imported(NAME, look)  # now
    assert look.seen == [3, 3]
    spec = sys.modules[NAME].__spec__
    assert spec.origin == str(package)
    assert type(spec.loader) is SourceFileLoader
    assert sys.modules[NAME].__loader__ is spec.loader


def test_called_by_a_package_that_is_there(package, look):
    importlib.import_module(NAME)
    import_hook.when_imported(NAME, look)
    assert look.seen == [3]
    assert not any(isinstance(finder, import_hook._Finder) for finder in sys.meta_path)


def test_an_import_that_fails_calls_nothing_and_the_next_one_does(package, look):
    good = package.read_text()
    package.write_text("raise OSError('no accelerator')\n")
    import_hook.when_imported(NAME, look)
    with pytest.raises(OSError, match="no accelerator"):
        importlib.import_module(NAME)
    assert look.seen == []
    package.write_text(good + "# of another length\n")
    importlib.invalidate_caches()
    importlib.import_module(NAME)
    assert look.seen == [3]


def test_a_package_that_is_imported_anew_is_called_for_again(package, look):
    import_hook.when_imported(NAME, look)
    module = importlib.import_module(NAME)
    importlib.reload(module)
    assert look.seen == [3, 3]
    del sys.modules[NAME]
    assert importlib.import_module(NAME) is not module
    assert look.seen == [3, 3, 3]


def test_a_package_that_is_absent_stays_so(package, monkeypatch):
    import_hook.when_imported("belief_dist_no_such_package", print)
    with pytest.raises(ModuleNotFoundError, match="No module named 'belief_dist_no_such_package'"):
        importlib.import_module("belief_dist_no_such_package")
    monkeypatch.setitem(sys.modules, NAME, None)  # the way to forbid one
    import_hook.when_imported(NAME, print)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(NAME)


def test_a_folder_without_code_is_left_alone(package):
    package.unlink()
    importlib.invalidate_caches()
    import_hook.when_imported(NAME, print)
    assert importlib.import_module(NAME).__file__ is None


def test_another_finder_of_this_kind(package, look):
    """Such as those of tracing tools, which also ask all others."""

    class Nosy:
        asks = False

        def find_spec(self, name, path=None, target=None):
            if name != NAME or self.asks:
                return None
            self.asks = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.asks = False

    sys.meta_path.insert(0, Nosy())
    import_hook.when_imported(NAME, look)
    sys.meta_path.insert(0, Nosy())
    importlib.import_module(NAME)
    assert look.seen == [3]


def test_while_another_thread_imports(package, look):
    package.write_text(
        "import threading\nbegun, go_on = threading.Event(), threading.Event()\n"
        "import sys; sys.belief_dist_test = begun, go_on\n"
        "begun.set(); go_on.wait(30)\nfrom . import part\nloaded = True\n"
    )
    importing = threading.Thread(target=importlib.import_module, args=[NAME])
    importing.start()
    while not hasattr(sys, "belief_dist_test"):
        pass
    begun, go_on = sys.belief_dist_test
    del sys.belief_dist_test
    assert begun.wait(30)
    threading.Timer(0.1, go_on.set).start()
    import_hook.when_imported(NAME, look)
    importing.join()
    assert look.seen == [3]
