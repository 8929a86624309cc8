"""What a piece of Python does, apart from how it is written: comments, docstrings, blank lines and form change nothing of it."""

import ast
import hashlib
from typing import Any


def of_code(source: str) -> str:
    """Digest of the syntax tree of ``source`` without its docstrings, the same by every version of Python that reads it.

    Raises SyntaxError where it is no Python.
    """
    return of_tree(ast.parse(source))


def of_tree(tree: ast.AST) -> str:
    """As `of_code`, of a tree."""
    return hashlib.blake2b(repr(_shape(tree)).encode(), digest_size=8).hexdigest()


def _shape(node: Any) -> Any:
    """A node as tuples. Fields that are empty are left out: which there are differs between versions of Python."""
    if isinstance(node, list):
        return [_shape(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, _without_docstring(node, name, value)) for name, value in ast.iter_fields(node)]
    return type(node).__name__, [(name, _shape(value)) for name, value in fields if value not in (None, [])]


def _without_docstring(node: ast.AST, name: str, value: Any) -> Any:
    is_body = name == "body" and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    return value[1:] if is_body and ast.get_docstring(node, clean=False) is not None else value  # type: ignore[arg-type]
