"""What a piece of Python does, apart from how it is written: comments, docstrings, blank lines, form, and the types that arguments and
results are said to have, change nothing of it."""

import ast
import copy
import hashlib
from typing import Any


def of_code(source: str) -> str:
    """Digest of the syntax tree of ``source``, as `bare` leaves it, the same by every version of Python that reads it.

    Raises SyntaxError where it is no Python.
    """
    return of_tree(ast.parse(source))


def of_tree(tree: ast.AST) -> str:
    """As `of_code`, of a tree."""
    return hashlib.blake2b(repr(_shape(bare(tree))).encode(), digest_size=8).hexdigest()


def bare(tree: ast.AST) -> ast.AST:
    """A copy of a tree without docstrings and without the annotations of arguments and results."""
    return _Bare().visit(copy.deepcopy(tree))


class _Bare(ast.NodeTransformer):
    def _without_docstring(self, node: Any) -> Any:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        return node

    def _function(self, node: Any) -> Any:
        node.returns = None
        return self._without_docstring(node)

    visit_Module = visit_ClassDef = _without_docstring
    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node


def _shape(node: Any) -> Any:
    """A node as tuples. Fields that are empty are left out: which there are differs between versions of Python."""
    if isinstance(node, list):
        return [_shape(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return type(node).__name__, [(name, _shape(value)) for name, value in fields]
