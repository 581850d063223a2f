"""The code of a method, task or family as a digest, so that an edited formula is another formula."""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any


@functools.cache
def code_digest(*objects: Callable[..., Any] | type) -> str:
    """16 hexadecimal digits of the SHA-256 of the source of functions and classes, as syntax trees.

    What they reach by name within their own package counts too: of a method, functions and constants in
    `vlprune.pruners`, of a task in `eval`, of a user's file in that file; of a class, its base classes. Comments,
    docstrings, annotations of functions and the layout of the source do not count. A function whose source is nowhere,
    as in an interactive session, counts by its byte code.

    Args:
        objects: functions, classes, or partial applications of them, whose bound arguments do not count.
    """
    found: dict[tuple[str, str], str] = {}
    for each in objects:
        for one in _unwrapped(each):
            root = _package(one.__module__)
            if not _collect(one.__module__, one.__qualname__.split(".")[0], root, found):
                assert isinstance(one, FunctionType), f"the source of {one} cannot be found"
                found[one.__module__, one.__qualname__] = repr(list(_byte_code(one.__code__)))
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]


def _unwrapped(one: Any) -> list[Any]:
    """The function of a partial application; a class with its bases that belong to this project or its user."""
    while isinstance(one, functools.partial):
        one = one.func
    if not isinstance(one, type):
        return [one]
    own = {_package(one.__module__), "vlprune.models", "eval"}
    return [base for base in one.__mro__ if _package(base.__module__) in own]


def _package(module: str) -> str:
    """The package whose names count together: "vlprune.pruners" of "vlprune.pruners.wanda", else the outermost."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "vlprune" else parts[0]


@dataclass(frozen=True)
class _Module:
    """The names that a module defines, and those that it imports: {name: (module, name there)}."""

    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str]]


@functools.cache
def _module(name: str) -> _Module | None:
    loaded = sys.modules.get(name)
    path = getattr(loaded, "__file__", None)
    if path is None and loaded is None:
        try:
            spec = find_spec(name)
        except ModuleNotFoundError:  # a name inside a module, which is no module itself
            return None
        path = spec.origin if spec else None
    if path is None or not Path(path).is_file():
        return None
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    definitions: dict[str, list[ast.stmt]] = {}
    imports: dict[str, tuple[str, str]] = {}
    for statement in tree.body:
        for defined in _defined(statement):
            definitions.setdefault(defined, []).append(statement)
        imports |= _imported(statement, name)
    return _Module(definitions, imports)


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _imported(statement: ast.AST, module: str) -> dict[str, tuple[str, str]]:
    """{local name: (module, name in it, or "" for the module itself)} of an import."""
    if isinstance(statement, ast.Import):
        return {
            a.asname or a.name.split(".")[0]: (a.name if a.asname else a.name.split(".")[0], "")
            for a in statement.names
        }
    if isinstance(statement, ast.ImportFrom):
        source = statement.module or ""
        if statement.level:
            source = ".".join([*module.split(".")[: -statement.level], *filter(None, [source])])
        return {a.asname or a.name: (source, a.name) for a in statement.names}
    return {}


@dataclass(frozen=True)
class _Definition:
    """A definition without what does not count, and the names that it reaches: (module, name, attribute of it)."""

    text: str
    reaches: frozenset[tuple[str, str, str]]


@functools.cache
def _definition(module: str, name: str) -> _Definition | None:
    known = _module(module)
    if known is None or name not in known.definitions:
        return None
    texts, reaches = [], set()
    for statement in known.definitions[name]:
        bare = _Bare().visit(ast.parse(ast.unparse(statement)))
        texts.append(ast.unparse(bare))
        nodes = list(ast.walk(bare))
        imports = {**known.imports}
        for node in nodes:
            imports |= _imported(node, module)
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imports:
                reaches.add((*imports[node.value.id], node.attr))
            elif isinstance(node, ast.Name):
                reaches.add((*imports.get(node.id, (module, node.id)), ""))
    return _Definition("\n".join(texts), frozenset(reaches))


def _collect(module: str, name: str, root: str, found: dict[tuple[str, str], str]) -> bool:
    """Adds a definition and what it reaches within the package; whether there is one."""
    if (module, name) in found:
        return True
    own = _definition(module, name)
    if own is None:
        known = _module(module)
        return known is not None and name in known.imports and _follow(*known.imports[name], "", root, found)
    found[module, name] = own.text
    for reached in own.reaches:
        _follow(*reached, root, found)
    return True


def _follow(module: str, name: str, attribute: str, root: str, found: dict[tuple[str, str], str]) -> bool:
    """Follows a name of a module, or an attribute of a module of that name, if it belongs to the package."""
    inner = f"{module}.{name}" if name else module
    if attribute and _package(inner) == root and _module(inner) is not None:
        return _collect(inner, attribute, root, found)
    return bool(name) and _package(module) == root and _collect(module, name, root, found)


class _Bare(ast.NodeTransformer):
    """Code without docstrings and without the annotations of functions."""

    def _stripped(self, node: Any) -> Any:
        self.generic_visit(node)
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        return self._stripped(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.returns = None
        return self._stripped(node)

    def visit_arg(self, node: ast.arg) -> Any:
        node.annotation = None
        return node


def _byte_code(code: CodeType) -> Iterator[object]:
    yield code.co_code.hex()
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _byte_code(constant)
        else:
            yield constant
