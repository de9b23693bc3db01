"""Who may import whom: the import chain is straight, and the core stands on torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "belief_dist"

# A module imports only from rows above its own.
ROWS = [
    {"rule", "layout", "options"},
    {"norm", "storage"},
    {"kernels", "params", "state", "buffers", "guard", "dtensors"},
    {"wire", "offload"},
    {"distributed"},
    {"collectives"},
    {"direct", "hybrid"},
    {"connect"},
    {"agreement"},
    {"gradients"},
    {"integrations"},
    {"optimizer"},
    {"sharded"},
    {"checkpoint"},
    {"in_deepspeed"},
    {"running"},
    {"cli", "hf", "run"},
    {"__init__"},
]
THIRD_PARTY = {"torch"}
OPTIONAL = {
    "integrations": {"deepspeed", "mpi4py"},
    "in_deepspeed": {"deepspeed"},
    "kernels": {"triton"},
    "distributed": {"mpi4py"},
    "checkpoint": {"safetensors"},
    "cli": {"rich"},
    "hf": {"transformers"},
}
# The only modules that may name an optional dependency at their top: nobody imports them at theirs.
LAZY = {"triton_kernel"}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "belief_dist":
                names |= {f"belief_dist.{alias.name}" for alias in node.names}
    return names - {"belief_dist"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_point_downward(path: Path) -> None:
    own = module_of(path)
    row = next(i for i, names in enumerate(ROWS) if own in names)
    allowed = {name for names in ROWS[:row] for name in names} | {own}
    for name in imports_of(path):
        top = name.split(".")[0]
        if top == "belief_dist":
            assert name.split(".")[1] in allowed, f"{own} may not import {name}"
        elif top not in sys.stdlib_module_names and top != "_belief_dist_autoload":
            assert top in THIRD_PARTY | OPTIONAL.get(own, set()), f"{own} imports {name}"


def imports_at_the_top(path: Path) -> set[str]:
    statements = ast.parse(path.read_text()).body
    return {
        name
        for node in statements
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        for name in (getattr(node, "module", None) or alias.name, alias.name)
    }


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_triton_is_imported_where_it_serves(path: Path) -> None:
    if path.stem in LAZY:
        return
    parts = {part for name in imports_at_the_top(path) for part in name.split(".")}
    assert not parts & {"triton", *LAZY}
    mentions = any(name.split(".")[0] == "triton" for name in imports_of(path))
    assert not mentions or path.stem == "triton_launch"


def test_import_is_light() -> None:
    """Importing the package loads none of the optional dependencies."""
    code = (
        "import sys, torch; before = set(sys.modules); import belief_dist; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'deepspeed', 'mpi4py', 'triton', 'numpy', 'rich', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
