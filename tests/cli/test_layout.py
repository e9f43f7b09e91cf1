"""The project's modules import one another downwards only, and never inside a function."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("ops", "tools", "generation", "training", "bench")
FILES = [
    *ROOT.glob("*.py"),
    *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")),
]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in FILES
}
# What the lowest modules may import of ours
LOWEST = {
    "config": {"tools.transformers_config"},
    "model_sizes": set(),
    "model": {"config", "model_sizes"},
}


def imported(name: str, node: ast.AST) -> set[str]:
    """Modules of ours that an import statement of a module names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & MODULES.keys()
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    above = package[: len(package) - node.level + 1] if node.level else []
    base = ".".join(above + ([node.module] if node.module else []))
    both = {f"{base}.{alias.name}" for alias in node.names} | {base}
    return both & MODULES.keys() - {name}


def imports(tree: ast.AST) -> list[ast.AST]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def test_no_module_imports_one_that_imports_it(trees):
    graph = {
        name: {found for node in imports(tree) for found in imported(name, node)}
        for name, tree in trees.items()
    }
    graph = {name: found - {name.rpartition(".")[0]} for name, found in graph.items()}  # packages
    assert graph["generate"] and list(graphlib.TopologicalSorter(graph).static_order())


def test_the_model_stands_on_its_config_and_the_ops_alone(trees):
    for name, tree in trees.items():
        found = {other for node in imports(tree) for other in imported(name, node)}
        if name.startswith("ops"):
            assert all(other.startswith("ops") for other in found), (name, found)
        if name in LOWEST:
            assert {other for other in found if not other.startswith("ops")} <= LOWEST[name], name


def test_nothing_of_ours_is_imported_within_a_function(trees):
    for name, tree in trees.items():
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = {other for node in imports(function) for other in imported(name, node)}
                assert not inside, (name, function.name, inside)
