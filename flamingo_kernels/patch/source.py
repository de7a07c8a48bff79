"""What a class computes, as a hash of the source that its forward runs.

Forks and other releases keep the names and arguments of a class and change its mathematics. So the code is
compared: the forward, and the methods, functions and constants of its module that the forward reaches.
Docstrings, comments, annotations and layout do not count. Objects of other modules count by their names.

The source counts only if compiling it gives the code that runs: a file may have been edited since, and code
may come from other text under the file's name.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib.util
import inspect
import linecache
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

_CALLS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")
_CHECKPOINTING = "transformers.modeling_layers.forward_with_checkpointing"
_Place = tuple[str, int]
_WORDS = ("annotation", "returns", "type_comment", "type_params", "ctx", "kind")


class Unreadable(Exception):
    """The source of a function is missing, or is not the code that runs."""


def code_hash(cls: type[nn.Module], home: str = "", *, origin: str = "") -> str:
    """16 hexadecimal digits, the same for every version of Python.

    Args:
        cls: a class of modules.
        home: the module whose functions count by their source. Default: the module of the class.
        origin: the module that home may be a copy of: the name that its classes get. Default: home.

    Raises:
        Unreadable: a source is missing, or is not the code that runs.

    Example:
        >>> from flamingo import MaskedCrossAttention
        >>> len(code_hash(MaskedCrossAttention))
        16
    """
    return hashlib.sha256("\n".join(_walk(cls, home, origin).texts).encode()).hexdigest()[:16]


def code_read(cls: type[nn.Module]) -> list[str]:
    """What `code_hash` reads, for people: every function, and what each of its names stands for."""
    return _walk(cls, cls.__module__).shown


def replaced(cls: type[nn.Module], home: str = "") -> list[str]:
    """The names that a class's forward reads from its module and that stand for something else by now.

    They are compared with what the module imports and defines, so a function that somebody has put in the
    place of another one is found, even if it does the same and more.
    """
    names, read = [], _walk(cls, home).read
    imports = {id(scope): _imports(scope) for scope in {id(each): each for each in read.values()}.values()}
    for name, scope in read.items():
        value, imported = scope[name], imports[id(scope)].get(name)
        if imported is not None:
            module = sys.modules.get(imported[0])
            expected = getattr(module, imported[1], module) if imported[1] else module
            if value is not expected:
                names.append(name)
        elif isinstance(value, FunctionType) and value.__globals__ is not scope:
            names.append(name)
    return sorted(names)


def _walk(cls: type[nn.Module], home: str, origin: str = "") -> _Walk:
    walk = _Walk(cls, home or cls.__module__, origin)
    for name in _CALLS:
        value = inspect.getattr_static(cls, name)
        if value is not inspect.getattr_static(nn.Module, name):
            walk.texts.append(f"{name} = {walk.describe(value)}")
    return walk


def _imports(scope: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The names that a module imports: the module each comes from, and its name there, empty for a module."""
    tree = _index("".join(linecache.getlines(scope["__file__"], scope))).tree
    package = scope.get("__package__") or ""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            home = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {each.asname or each.name: (home, each.name) for each in node.names}
        elif isinstance(node, ast.Import):
            for each in node.names:
                first = each.name.partition(".")[0]
                found[each.asname or first] = (each.name if each.asname else first, "")
    return found


def unwrapped(function: Any) -> Any:
    """A forward without the wrapper that transformers puts around those of layers and their subclasses."""
    while isinstance(function, FunctionType) and _name(function) == _CHECKPOINTING:
        function = inspect.getclosurevars(function).nonlocals["forward"]
    return function


class _Walk:
    """Goes from a class's forward to everything that it reaches.

    Attributes:
        texts: the functions of the home as text, in the order in which they were met.
        shown: the same for people.
        read: the names that they read from the home, with the scope in which they found them.
    """

    def __init__(self, cls: type[nn.Module], home: str, origin: str = "") -> None:
        self.cls, self.home, self.origin = cls, home, origin or home
        self.texts: list[str] = []
        self.shown: list[str] = []
        self.read: dict[str, dict[str, Any]] = {}
        self._met: dict[FunctionType, str] = {}

    def describe(self, value: Any) -> str:
        """A value in words: a constant as itself, a function by what it does, all else by its name."""
        if isinstance(value, (staticmethod, classmethod, MethodType)):
            return self.describe(value.__func__)
        if isinstance(value, property):
            return self.describe(value.fget)
        if isinstance(value, FunctionType):
            return self._function(unwrapped(value))
        if isinstance(value, functools.partial):
            return f"partial {self.describe((value.func, value.args, value.keywords))}"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(self.describe, value))})"
        if isinstance(value, dict):
            return self.describe(list(value.items()))
        if isinstance(value, ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, type):
            place = self.origin if value.__module__ == self.home else value.__module__
            return f"class {_library(place)}.{value.__qualname__}"
        if isinstance(value, BuiltinFunctionType):
            return f"builtin {value.__name__}"
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
            return f"{type(value).__name__} {value!r}"
        return f"a {self.describe(type(value))}"

    def _function(self, function: FunctionType) -> str:
        if function in self._met:
            return self._met[function]
        code, scope = function.__code__, function.__globals__
        at_home = scope.get("__name__") == self.home
        name = code.co_name if at_home else f"{_library(_name(function))}.{code.co_name}"
        self._met[function] = f"function {len(self._met)} {name}"
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        reached = {name: value for name, cell in cells if (value := _content(cell)) is not self.cls}
        lines, shown = [], []
        if at_home:
            tree = _definition(code, _source(code, scope))
            lines.append(_normal(tree))
            shown.append(ast.unparse(tree))
            lines.append(f"defaults = {self.describe((function.__defaults__, function.__kwdefaults__))}")
            for node in _nodes(tree):
                if isinstance(node, ast.Name) and node.id in scope:
                    reached.setdefault(node.id, scope[node.id])
                    self.read[node.id] = scope
            reached |= {f"self.{name}": value for name, value in self._members(tree)}
        names = [f"{name} = {self.describe(reached[name])}" for name in sorted(reached)]
        if lines or names:
            self.texts.append("\n".join([self._met[function], *lines, *names]))
            self.shown.append(
                "\n".join([f"# {self._met[function]}", *shown, *(f"#   {each}" for each in names)])
            )
        return self._met[function]

    def _members(self, tree: ast.AST) -> Iterator[tuple[str, Any]]:
        """The class's own attributes that a method reads from `self`, by name."""
        for node in _nodes(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                value = inspect.getattr_static(self.cls, node.attr, None)
                if value is not None and value is not inspect.getattr_static(nn.Module, node.attr, None):
                    yield node.attr, value


def _name(function: FunctionType) -> str:
    """Where a function was defined; its `__module__` and `__name__` may be copies of another's."""
    return f"{function.__globals__.get('__name__')}.{function.__code__.co_name}"


def _library(module: str) -> str:
    return module.partition(".")[0]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell: the function refers to itself
        return None


def _source(code: CodeType, scope: dict[str, Any]) -> str:
    linecache.checkcache(code.co_filename)
    source = "".join(linecache.getlines(code.co_filename, scope))
    if not source:
        raise Unreadable(f"the source of {code.co_name} cannot be read from {code.co_filename}")
    return source


class _Index(NamedTuple):
    """A source, and what is defined in it by name and first line.

    Attributes:
        tree: all of it.
        definitions: the parts of the tree.
        codes: what they compile to.
    """

    tree: ast.Module
    definitions: dict[_Place, list[ast.AST]]
    codes: dict[_Place, list[CodeType]]


@functools.lru_cache(maxsize=1)  # callers ask for the functions of one file in a row
def _index(source: str) -> _Index:
    tree = ast.parse(source)
    index = _Index(tree, {}, {})
    for node in ast.walk(tree):
        if place := _place(node):
            index.definitions.setdefault(place, []).append(node)
    for code in _codes(compile(tree, "", "exec", dont_inherit=True)):
        index.codes.setdefault((code.co_name, code.co_firstlineno), []).append(code)
    return index


@functools.lru_cache(maxsize=256)
def _definition(code: CodeType, source: str) -> ast.AST:
    """The definition in a source that this code was compiled from."""
    try:
        index = _index(source)
    except SyntaxError as error:
        raise Unreadable(f"the source of {code.co_name} in {code.co_filename} is not Python") from error
    place = (code.co_name, code.co_firstlineno)
    found = index.definitions.get(place, [])
    if len(found) != 1 or not any(_is_same(code, each) for each in index.codes.get(place, [])):
        raise Unreadable(f"the source of {code.co_name} in {code.co_filename} is not what runs")
    definition = copy.copy(found[0])
    definition.decorator_list = []  # type: ignore[attr-defined]  # the walk meets their result where it is used
    return definition


def _place(node: ast.AST) -> _Place | None:
    """The name and first line of a definition as in its code object: decorators belong to it."""
    if isinstance(node, ast.Lambda):
        return "<lambda>", node.lineno
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return node.name, min([node.lineno, *(each.lineno for each in node.decorator_list)])
    return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _is_same(a: CodeType, b: CodeType) -> bool:
    """Whether two code objects do the same. In Python 3.11 `==` also compares what running specialised."""
    names = ("co_name", "co_firstlineno", "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars")
    counts = ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags")
    if any(getattr(a, name) != getattr(b, name) for name in (*names, *counts)):
        return False
    pairs = zip(a.co_consts, b.co_consts, strict=False)
    return len(a.co_consts) == len(b.co_consts) and all(_is_same_constant(*pair) for pair in pairs)


def _is_same_constant(a: Any, b: Any) -> bool:
    if isinstance(a, CodeType) and isinstance(b, CodeType):
        return _is_same(a, b)
    if isinstance(a, frozenset) and isinstance(b, frozenset):
        return sorted(map(repr, a)) == sorted(map(repr, b))
    return type(a) is type(b) and repr(a) == repr(b)


def _fields(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """The fields of a tree that say what it does, without annotations, docstrings and empty fields."""
    for name in node._fields:
        value = getattr(node, name, None)
        if isinstance(value, list):
            value = [each for each in value if not _is_word(each)]
        if name not in _WORDS and value not in (None, []):
            yield name, value


def _is_word(node: Any) -> bool:
    bare = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return bare or (isinstance(node, ast.AnnAssign) and node.value is None)


def _nodes(node: Any) -> Iterator[ast.AST]:
    """The nodes of a tree that say what it does."""
    if isinstance(node, list):
        for each in node:
            yield from _nodes(each)
    elif isinstance(node, ast.AST):
        yield node
        for _, value in _fields(node):
            yield from _nodes(value)


def _normal(node: Any) -> str:
    """A tree as text. `ast.dump` differs between versions of Python in fields that are empty."""
    if isinstance(node, list):
        return f"[{' '.join(map(_normal, node))}]"
    if isinstance(node, ast.JoinedStr):
        return f"(JoinedStr {' '.join(_pieces(node))})"
    if isinstance(node, ast.AnnAssign):
        return _normal(ast.Assign([node.target], cast(ast.expr, node.value)))
    if isinstance(node, ast.AST):
        fields = (f"{name}={_normal(value)}" for name, value in _fields(node))
        return f"({type(node).__name__} {' '.join(fields)})"
    return f"{type(node).__name__}:{node!r}"


def _pieces(node: ast.JoinedStr) -> Iterator[str]:
    """The pieces of a formatted string, adjacent texts joined, as Python versions split them differently."""
    text = ""
    for each in node.values:
        if isinstance(each, ast.Constant):
            text += str(each.value)
        else:
            yield from [repr(text)] * bool(text)
            text = ""
            yield _normal(each)
    yield from [repr(text)] * bool(text)
