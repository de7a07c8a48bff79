"""Which module may import which, read from the source: imports in functions count, those for types do not."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers import ROOT

KERNELS = "flamingo_kernels"
DOOR = "flamingo.kernels"  # the only module of flamingo that asks for the kernels
BACKENDS = {"reference", "triton_fwd", "triton_bwd"}

Graph = Mapping[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Both packages' files by the names of the modules."""
    files = [path for package in ("flamingo", KERNELS) for path in (root / package).rglob("*.py")]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


def read(root: Path) -> Graph:
    """What each module imports. That runs the packages around the target too, unless they run already."""
    files = modules(root)
    return {name: {each for each in _imported(name, files) if each != name} for name in files}


def _imported(name: str, files: Mapping[str, Path]) -> Iterator[str]:
    path = files[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for target in _targets(ast.parse(path.read_text()), package, files):
        parts = target.split(".")
        for count in range(1, len(parts) + 1):
            each = ".".join(parts[:count])
            if each in files and (each == target or not f"{name}.".startswith(f"{each}.")):
                yield each


def _targets(tree: ast.AST, package: str, files: Mapping[str, Path]) -> Iterator[str]:
    """The full names of the modules that a tree imports."""
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            home = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{home}.{alias.name}" for alias in node.names]
            yield from (name if name in files else home for name in names)
        elif isinstance(node, ast.Call) and node.args and _is_import(node.func):
            yield _beginning(node.args[0])


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and child in node.body):
            yield from _executed(child)


def _is_import(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def _beginning(text: ast.expr) -> str:
    """A string, or a formatted one up to its first value; other expressions are not read."""
    if isinstance(text, ast.JoinedStr):
        text = text.values[0]
    return str(text.value).rstrip(".") if isinstance(text, ast.Constant) else ""


def circle(graph: Graph) -> list[str]:
    """The modules of a circle, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def folders(graph: Graph) -> Graph:
    """The graph of the sub-packages and top-level modules of the kernels."""
    found: dict[str, set[str]] = {}
    for name, imported in graph.items():
        if name.startswith(f"{KERNELS}.") and name != f"{KERNELS}.__main__":
            inside = {_folder(each) for each in imported if each.startswith(f"{KERNELS}.")}
            found.setdefault(_folder(name), set()).update(inside - {_folder(name)})
    return found


def _folder(name: str) -> str:
    return ".".join(name.split(".")[:2])


def strays_to_kernels(graph: Graph) -> list[tuple[str, str]]:
    """Imports of the kernels by the reference, except at its door."""
    return [
        (name, each)
        for name, imported in graph.items()
        for each in imported
        if name.split(".")[0] == "flamingo" and each.split(".")[0] == KERNELS and name != DOOR
    ]


def strays_to_backends(graph: Graph) -> list[tuple[str, str]]:
    """Imports of one backend by another, and of a backward pass by a forward pass."""
    pairs = [(name, each) for name, imported in graph.items() for each in imported]
    inside = [(name, each) for name, each in pairs if _backend(name) and _backend(each)]
    return [
        (name, each)
        for name, each in inside
        if _backend(name) != _backend(each) or (name.endswith("_fwd") and each.endswith("_bwd"))
    ]


def _backend(name: str) -> str:
    """The backend that a module of an operator belongs to, or an empty string."""
    last = name.rpartition(".")[2]
    return last.partition("_")[0] if name.startswith(f"{KERNELS}.ops.") and last in BACKENDS else ""


def strays_to_commands(graph: Graph) -> list[tuple[str, str]]:
    """Imports of commands by modules that are no commands."""
    home = f"{KERNELS}.commands"
    return [
        (name, each)
        for name, imported in graph.items()
        for each in imported
        if f"{each}.".startswith(f"{home}.")
        and not f"{name}.".startswith(f"{home}.")
        and name != f"{KERNELS}.__main__"
    ]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return read(ROOT)


def test_no_modules_import_each_other(graph):
    assert circle(graph) == []


def test_no_folders_import_each_other(graph):
    assert circle(folders(graph)) == []


def test_the_reference_asks_for_kernels_at_its_door_only(graph):
    assert strays_to_kernels(graph) == []
    assert any(each.startswith(KERNELS) for each in graph[DOOR])


def test_backends_do_not_import_each_other(graph):
    assert strays_to_backends(graph) == []


def test_commands_are_imported_by_commands_only(graph):
    assert strays_to_commands(graph) == []


def plant(root: Path, **files: str) -> Graph:
    """The graph of a tree with these files; __ in a name stands for a folder."""
    for name, text in files.items():
        path = root / KERNELS / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path.parent, root / KERNELS):
            (folder / "__init__.py").touch()
        path.write_text(text)
    return read(root)


@pytest.mark.parametrize(
    "text",
    [
        "from . import b",
        "from .b import x",
        f"import {KERNELS}.b",
        f"from {KERNELS} import b",
        "def late():\n    from .b import x",
        f"from importlib import import_module\nimport_module('{KERNELS}.b')",
        f"__import__('{KERNELS}.b')",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    from . import b",
    ],
)
def test_a_planted_circle_is_found(text, tmp_path):
    assert {*circle(plant(tmp_path, a=text, b="from .a import y"))} == {f"{KERNELS}.a", f"{KERNELS}.b"}


def test_imports_for_types_are_no_circle(tmp_path):
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import x"
    assert not circle(plant(tmp_path, a=types, b="from .a import y"))


def test_a_package_imports_what_its_init_does(tmp_path):
    found = plant(tmp_path, a="from .inner import c", inner__c="")
    (tmp_path / KERNELS / "inner" / "__init__.py").write_text("from ..a import x")
    assert not circle(found)
    assert circle(read(tmp_path))


def test_a_planted_circle_of_folders_is_found(tmp_path):
    found = plant(tmp_path, one__a="from ..two import b", two__b="", two__c="from ..one import d", one__d="")
    assert not circle(found)
    assert {*circle(folders(found))} == {f"{KERNELS}.one", f"{KERNELS}.two"}


def test_planted_strays_are_found(tmp_path):
    operator = "ops__norm__"
    found = plant(
        tmp_path,
        **{f"{operator}triton_fwd": "from . import triton_bwd"},
        **{f"{operator}triton_bwd": "from . import reference"},
        **{f"{operator}reference": "from ...commands import check"},
        commands__check="",
    )
    home = f"{KERNELS}.ops.norm"
    assert {*strays_to_backends(found)} == {
        (f"{home}.triton_fwd", f"{home}.triton_bwd"),
        (f"{home}.triton_bwd", f"{home}.reference"),
    }
    commands = {f"{KERNELS}.commands", f"{KERNELS}.commands.check"}
    assert {*strays_to_commands(found)} == {(f"{home}.reference", each) for each in commands}


@pytest.mark.parametrize("text", [f"import {KERNELS}", f"import_module(f'{KERNELS}.{{name}}')"])
def test_a_planted_import_of_kernels_by_the_reference_is_found(text, tmp_path):
    plant(tmp_path, a="")
    (tmp_path / "flamingo").mkdir()
    (tmp_path / "flamingo" / "modules.py").write_text(text)
    assert strays_to_kernels(read(tmp_path)) == [("flamingo.modules", KERNELS)]
