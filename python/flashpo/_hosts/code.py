"""Reads the code of a host's function: its parameters, the names that it reads, its tuples, and its fingerprint.

Every function here takes a function of a host. A wrapped one is unwrapped.
"""

import ast
import functools
import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any


def parameters(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def takes(function: Callable, name: str) -> bool:
    """Whether a call of the function may have the keyword `name`."""
    found = inspect.signature(function).parameters
    return name in found or any(p.kind is p.VAR_KEYWORD for p in found.values())


@functools.cache  # it is called every time that TRL's names are replaced
def names(function: Callable) -> set[str]:
    """The names of globals and attributes that the function, and functions defined in it, read or set."""

    def of(code: CodeType) -> set[str]:
        return set(code.co_names).union(*(of(x) for x in code.co_consts if isinstance(x, CodeType)))

    unwrapped: Any = inspect.unwrap(function)
    code = getattr(unwrapped, "__code__", None)
    return set() if code is None else of(code)


def returned(function: Callable) -> list[tuple[str, ...]]:
    """The tuples in the function's return statements, as source texts; empty if there is no source.

    Return statements of functions defined in it do not count.
    """
    return [
        tuple(ast.unparse(x) for x in node.value.elts)
        for node in _nodes(function)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
    ]


def unpacked(function: Callable, method: str) -> set[int]:
    """Into how many names the function unpacks the result of `self.method`, for each number that occurs."""
    found = set()
    for node in _nodes(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Tuple):
            called = node.value.func
            if isinstance(called, ast.Attribute) and called.attr == method:
                found.add(len(node.targets[0].elts))
    return found


def arguments(function: Callable, called: str) -> list[tuple[str, ...]]:
    """The positional arguments of each call of `called` in the function or in functions defined in it."""
    return [
        tuple(ast.unparse(x) for x in node.args)
        for node in _whole(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == called
    ]


def assigned(function: Callable) -> list[tuple[str, ...]]:
    """The tuples of names that the function, or functions defined in it, unpack a value into."""
    targets = (target for node in _whole(function) if isinstance(node, ast.Assign) for target in node.targets)
    return [tuple(ast.unparse(x) for x in target.elts) for target in targets if isinstance(target, ast.Tuple)]


@functools.cache
def fingerprint(function: Callable) -> str:
    """A hash of the function's code; empty if there is no source.

    It does not change with comments, the docstring or white space.
    """
    source, definition = _definition(function)
    if definition is None:
        return ""
    lines = source.splitlines(keepends=True)
    if ast.get_docstring(definition) is not None:
        docstring: Any = definition.body[0]
        for line in range(docstring.lineno - 1, docstring.end_lineno):
            lines[line] = "\n"
    for token in tokenize.generate_tokens(io.StringIO("".join(lines)).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column] + "\n"
    return hashlib.sha256("".join("".join(lines).split()).encode()).hexdigest()[:12]


def _definition(function: Callable) -> tuple[str, ast.FunctionDef | None]:
    """The source of a function and its syntax tree; None if there is no source or it is not that of a definition."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        statement = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return "", None
    return source, statement if isinstance(statement, ast.FunctionDef) else None


def _whole(function: Callable) -> Iterator[ast.AST]:
    _, definition = _definition(function)
    return iter(()) if definition is None else ast.walk(definition)


def _nodes(function: Callable) -> Iterator[ast.AST]:
    """The nodes of the function's syntax tree, without those of functions defined in it."""
    _, definition = _definition(function)
    within: list[ast.AST] = [] if definition is None else [definition]
    while within:
        for node in ast.iter_child_nodes(within.pop()):
            yield node
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                within.append(node)
