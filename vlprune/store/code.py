"""The code of a method, task or family as a digest, so that an edited formula is another formula."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

PLAIN = (bool, int, float, complex, str, bytes, type(None))


@functools.cache
def code_digest(*objects: Callable[..., Any] | type, options: type | None = None) -> str:
    """16 hexadecimal digits of the SHA-256 of the source of functions and classes, as syntax trees.

    What they reach by name within their own package counts too: of a method, functions and constants in
    `vlprune.pruners`, of a task in `eval`, of a user's file in that file and in those beside it; of a class, its base
    classes; of a partial application and a closure, the values that are bound. Comments, docstrings, annotations of
    functions, the layout of the source and what is raised do not count. A function whose source is nowhere, as in an
    interactive session, counts by its byte code.

    Args:
        objects: functions, classes, or partial applications of functions to plain values.
        options: class of options whose fields and their defaults do not count: in a key, the values stand by
            themselves where they differ from the defaults. Its other attributes count.

    Raises:
        TypeError: an object that is none of these, or is bound to a value that is neither plain nor a function.
    """
    sought = _Sought(
        {}, frozenset((base.__module__, base.__qualname__) for base in options.__mro__) if options else frozenset()
    )
    for each in (*objects, *([options] if options else [])):
        _collect_object(each, sought)
    return hashlib.sha256(repr(sorted(sought.found.items())).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Sought:
    """What a digest is made of.

    Attributes:
        found: {(module, name): source} of what was found so far, which is added to.
        fieldless: (module, name) of the classes whose fields do not count.
    """

    found: dict[tuple[str, str], str]
    fieldless: frozenset[tuple[str, str]]


def _collect_object(each: Any, sought: _Sought) -> None:
    """Adds the source of a function or class, and of what it is bound to; decorators count by their lines there."""
    each = inspect.unwrap(each) if callable(each) else each
    if isinstance(each, functools.partial):
        _collect_object(each.func, sought)
        for name, value in [*enumerate(each.args), *each.keywords.items()]:
            _collect_value(each.func, str(name), value, sought)
    elif isinstance(each, type):
        own = {_package(each.__module__), "vlprune.models", "eval"}
        for base in each.__mro__:
            if _package(base.__module__) in own:
                scope = _Scope(base.__module__, sought)
                if not _collect(base.__module__, base.__qualname__.split(".")[0], scope):
                    raise TypeError(f"the source of {base} cannot be found")
    elif isinstance(each, FunctionType):
        scope, name = _Scope(each.__module__, sought), each.__qualname__.split(".")[0]
        known = _collect_at(each, scope) if name == "<lambda>" else _collect(each.__module__, name, scope)
        if not known:
            sought.found[each.__module__, each.__qualname__] = repr(list(_byte_code(each.__code__)))
        for name, cell in zip(each.__code__.co_freevars, each.__closure__ or (), strict=True):
            _collect_value(each, name, cell.cell_contents, sought)
    else:
        raise TypeError(f"{each!r} is no function, class or partial application, so that its source cannot be found")


def _collect_value(owner: Any, name: str, value: Any, sought: _Sought) -> None:
    """Adds a value that a function is bound to."""
    if isinstance(value, FunctionType | type | functools.partial):
        _collect_object(value, sought)
    elif is_dataclass(value):
        for field in fields(value):
            _collect_value(owner, f"{name}.{field.name}", getattr(value, field.name), sought)
    elif (words := _plain(value)) is not None:
        sought.found[owner.__module__, f"{owner.__qualname__}: {name} = {words}"] = ""
    else:
        raise TypeError(f"{owner!r} is bound to {name} = {value!r}, which is neither a plain value nor a function")


def _plain(value: Any) -> str | None:
    """A plain value in words, the same in every process; None of another value."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, tuple | list | set | frozenset):
        inner = value
    else:
        return None
    words = [_plain(each) for each in inner]
    if None in words:
        return None
    ordered = sorted(map(str, words)) if isinstance(value, set | frozenset) else words
    return f"{type(value).__name__} {ordered}"


def _package(module: str) -> str:
    """The package whose names count together: "vlprune.pruners" of "vlprune.pruners.wanda", else the outermost."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "vlprune" else parts[0]


class _Scope:
    """What counts: the package of a module, and where that is a user's file, the files beside it."""

    def __init__(self, module: str, sought: _Sought) -> None:
        self.sought, self.root = sought, _package(module)
        path = None if self.root.split(".")[0] in ("vlprune", "eval") else _path(self.root)
        self.beside = None if path is None else path.parent

    def counts(self, module: str) -> bool:
        """Whether the names of a module count."""
        if _package(module) == self.root:
            return True
        path = _path(_package(module)) if self.beside else None
        return path is not None and path.parent == self.beside


@dataclass(frozen=True)
class _Module:
    """The names that a module defines, those that it imports, and the modules of which it imports all names.

    Attributes:
        definitions: {name: the statements that bind it or change what it stands for}.
        imports: {name: (module, name there, or "" for the module itself)}.
        stars: modules after `from … import *`.
        statements: all statements in order.
    """

    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str]]
    stars: tuple[str, ...]
    statements: list[ast.stmt]


def _path(name: str) -> Path | None:
    """The source file of a module."""
    loaded = sys.modules.get(name)
    path = getattr(loaded, "__file__", None)
    if path is None and loaded is None:
        try:
            spec = find_spec(name)
        except (ModuleNotFoundError, ValueError):  # a name inside a module, which is no module itself
            return None
        path = spec.origin if spec else None
    return Path(path) if path is not None and Path(path).is_file() else None


@functools.cache
def _module(name: str) -> _Module | None:
    path = _path(name)
    if path is None or path.suffix != ".py":
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions: dict[str, list[ast.stmt]] = {}
    imports: dict[str, tuple[str, str]] = {}
    stars: list[str] = []
    for statement in tree.body:
        for inner in _outside_functions(statement):
            imports |= (own := _imported(inner, name))
            stars += [source for local, (source, _) in own.items() if local == "*"]
        for defined in dict.fromkeys(_defined(statement)):
            definitions.setdefault(defined, []).append(statement)
    return _Module(definitions, imports, tuple(stars), tree.body)


def _outside_functions(statement: ast.stmt) -> Iterator[ast.AST]:
    """A statement and all that is inside it, functions and classes unopened: what runs when the module is imported."""
    yield statement
    if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        for child in ast.iter_child_nodes(statement):
            yield from _outside_functions(child)  # type: ignore[arg-type]


def _defined(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module binds, or that it changes by a call, as in `TABLE.update(…)`."""
    for node in _outside_functions(statement):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.For | ast.NamedExpr):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (inner.id for inner in ast.walk(target) if isinstance(inner, ast.Name))
        elif isinstance(node, ast.Expr):
            yield from (inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))


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
            path = _path(module)
            inside = 0 if path is not None and path.name == "__init__.py" else 1
            kept = module.split(".")[: len(module.split(".")) - statement.level + 1 - inside]
            source = ".".join([*kept, *filter(None, [source])])
        return {a.asname or a.name: (source, a.name) for a in statement.names}
    return {}


@dataclass(frozen=True)
class _Definition:
    """A definition without what does not count, and the names that it reaches: (module, name, attribute of it)."""

    text: str
    reaches: frozenset[tuple[str, str, str]]


@functools.cache
def _definition(module: str, name: str, fieldless: bool) -> _Definition | None:
    known = _module(module)
    if known is None or name not in known.definitions:
        return None
    return _read(module, known, known.definitions[name], fieldless)


def _read(module: str, known: _Module, statements: Sequence[ast.stmt], fieldless: bool) -> _Definition:
    """The source of statements of a module; of a class without fields, also without its decorators, which read them."""
    texts, reaches = [], set()
    for statement in statements:
        bare = _Bare().visit(ast.parse(ast.unparse(statement)))
        if fieldless:
            for node in ast.walk(bare):
                if isinstance(node, ast.ClassDef):
                    node.body = [own for own in node.body if not isinstance(own, ast.AnnAssign)] or [ast.Pass()]
                    node.decorator_list = []
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


def _collect(module: str, name: str, scope: _Scope) -> bool:
    """Adds a definition and what it reaches of what counts; whether there is one."""
    if (module, name) in scope.sought.found:
        return True
    own = _definition(module, name, (module, name) in scope.sought.fieldless)
    if own is None:
        known = _module(module)
        if known is None:
            return False
        if name in known.imports:
            return _follow(*known.imports[name], "", scope)
        return any(_follow(star, name, "", scope) for star in known.stars)
    _add(module, name, own, scope)
    return True


def _collect_at(function: FunctionType, scope: _Scope) -> bool:
    """Adds the statement of a module that a lambda is written in; whether it is found."""
    module, line = function.__module__, function.__code__.co_firstlineno
    known = _module(module)
    if known is None:
        return False
    around = [s for s in known.statements if s.lineno <= line <= (s.end_lineno or s.lineno)]
    lambdas = [node for s in around for node in ast.walk(s) if isinstance(node, ast.Lambda) and node.lineno == line]
    if not lambdas:
        return False
    own = _read(module, known, around, fieldless=False)
    if (module, own.text) not in scope.sought.found:
        _add(module, own.text, own, scope)
    return True


def _add(module: str, name: str, own: _Definition, scope: _Scope) -> None:
    scope.sought.found[module, name] = own.text
    for reached in own.reaches:
        _follow(*reached, scope)


def _follow(module: str, name: str, attribute: str, scope: _Scope) -> bool:
    """Follows a name of a module, or an attribute of a module of that name, if it counts."""
    inner = f"{module}.{name}" if name else module
    if attribute and scope.counts(inner) and _module(inner) is not None:
        return _collect(inner, attribute, scope)
    return bool(name) and scope.counts(module) and _collect(module, name, scope)


class _Bare(ast.NodeTransformer):
    """Code without docstrings, the annotations of functions, and what is raised."""

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

    def visit_Raise(self, node: ast.Raise) -> Any:
        return ast.Pass(**{name: getattr(node, name) for name in ("lineno", "col_offset")})

    def visit_Assert(self, node: ast.Assert) -> Any:
        self.generic_visit(node)
        node.msg = None
        return node

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
            yield sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
