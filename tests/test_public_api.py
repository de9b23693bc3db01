"""The public API is what `public_api.txt` says; a change of it is a decision, not an accident.

After a change that is meant, write the file again, and read its diff as a user would:

    python -m tests.test_public_api
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

from tests.harness.paths import ROOT

FROZEN = Path(__file__).with_name("public_api.txt")
# hf needs transformers.
MODULES = ("belief_dist", "checkpoint", "data", "distributed", "hf", "replay", "telemetry")
SPECIAL = ("__call__", "__enter__", "__exit__", "__getitem__", "__iter__", "__len__")
WIDTH = 100


def load(name: str) -> ModuleType:
    return importlib.import_module(name if name == "belief_dist" else f"belief_dist.{name}")


def public_names(module: ModuleType) -> list[str]:
    """Return `__all__`, or the classes and functions that a module without one defines itself."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    )


def signature(start: str, function: Any) -> Iterator[str]:
    """Give `start` and a signature: on one line, or a line for each argument."""
    text = inspect.signature(function)
    line = f"{start}{text}"
    if len(line) <= WIDTH:
        yield line
        return
    indent = " " * (len(start) - len(start.lstrip()))
    yield f"{start}("
    kind = None
    for parameter in text.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and kind not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            yield f"{indent}    *,"
        kind = parameter.kind
        yield f"{indent}    {parameter},"
    returned = text.return_annotation
    shown = "" if returned is text.empty else f" -> {inspect.formatannotation(returned)}"
    yield f"{indent}){shown}"


def members(owner: type) -> dict[str, Any]:
    """Return what classes of this package define: what torch's define differs by its version."""
    found: dict[str, Any] = {}
    for each in reversed(owner.__mro__):
        if each.__module__.split(".")[0] == "belief_dist":
            found.update(vars(each))
    return found


def describe_class(name: str, owner: type) -> Iterator[str]:
    own = members(owner)
    if {"__init__", "__new__"} & own.keys():
        yield from signature(f"class {name}", owner)
    else:
        yield f"class {name}"
    bases = [each.__name__ for each in owner.__bases__ if each is not object]
    if bases:
        yield f"    is a {', '.join(bases)}"
    for member, value in sorted(own.items()):
        hidden = member.startswith("_") and member not in SPECIAL
        if hidden or member in getattr(owner, "__dataclass_fields__", ()):  # those are arguments
            continue
        if isinstance(value, property):
            settable = ", settable" if value.fset else ""
            yield f"    property {member}{settable}"
        elif isinstance(value, (classmethod, staticmethod)):
            kind = type(value).__name__
            yield from signature(f"    {kind} {member}", value.__func__)
        elif inspect.isfunction(value):
            yield from signature(f"    {member}", value)
        else:
            yield f"    attribute {member}"


def describe(name: str) -> str:
    """Return all that is public in a module, as text."""
    module = load(name)
    lines = []
    for public in public_names(module):
        value = getattr(module, public)
        if inspect.isclass(value):
            lines += describe_class(public, value)
        elif inspect.isfunction(value):
            lines += signature(f"def {public}", value)
        else:
            lines.append(f"{public}: {type(value).__name__}")
    return "\n".join(lines) + "\n"


def heading(name: str) -> str:
    return f"# {load(name).__name__}\n"


def frozen(name: str) -> str:
    """Return what the file says of a module."""
    _, _, rest = FROZEN.read_text().partition(heading(name))
    return rest.split("\n# ")[0].rstrip("\n") + "\n"


@pytest.mark.parametrize("name", MODULES)
def test_the_public_api_is_the_frozen_one(name: str) -> None:
    if name == "hf":
        pytest.importorskip("transformers")
    assert describe(name) == frozen(name), "meant? Then: python -m tests.test_public_api"


def test_every_public_name_exists_and_is_documented() -> None:
    for name in set(MODULES) - {"hf"}:
        module = load(name)
        for public in public_names(module):
            value = getattr(module, public)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert inspect.getdoc(value), f"{module.__name__}.{public}"


def test_what_is_packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Type checkers read the package (PEP 561), and the modules beside it come along."""
    assert files("belief_dist").joinpath("py.typed").is_file()
    monkeypatch.chdir(ROOT)
    project = apply_configuration(Distribution(), ROOT / "pyproject.toml")
    project.include_package_data = False  # what package-data names, and nothing git knows
    build = project.get_command_obj("build_py")
    build.ensure_finalized()
    data = {(package, name) for package, *_, names in build.data_files for name in names}
    assert ("belief_dist", "py.typed") in data
    assert set(build.py_modules) == {path.stem for path in ROOT.glob("_belief_dist_*.py")}


if __name__ == "__main__":
    FROZEN.write_text("\n".join(heading(name) + describe(name) for name in MODULES))
