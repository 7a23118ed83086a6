"""Mutants for `mutate.py`: small wrong changes of a Python file.

A mutant replaces one node of the syntax tree at its place in the text, so all other lines stay
unchanged. Docstrings, annotations, messages of errors and logs, names, and code for type checkers
are not changed, because no test checks them.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator

_BINARY: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(),
    ast.Sub: ast.Add(),
    ast.Mult: ast.Div(),
    ast.Div: ast.Mult(),
    ast.FloorDiv: ast.Mult(),
    ast.Mod: ast.FloorDiv(),
    ast.Pow: ast.Mult(),
    ast.BitAnd: ast.BitOr(),
    ast.BitOr: ast.BitAnd(),
    ast.LShift: ast.RShift(),
    ast.RShift: ast.LShift(),
}
# Changes the bound of an order and the sense of an equality.
_COMPARED: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Lt: ast.LtE(),
    ast.LtE: ast.Lt(),
    ast.Gt: ast.GtE(),
    ast.GtE: ast.Gt(),
    ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(),
    ast.Is: ast.IsNot(),
    ast.IsNot: ast.Is(),
    ast.In: ast.NotIn(),
    ast.NotIn: ast.In(),
}
# Calls whose removal or arguments no test needs to detect.
_SPOKEN = ("logger", "warnings", "logging", "typing", "TypeVar", "cast")
# Functions that raise at once if their arguments are swapped.
_ORDERED = ("isinstance", "issubclass", "getattr", "hasattr", "setattr")
_SPOKEN_NAMES = ("__slots__", "__all__", "logger")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        line: of the node, from 1.
        column: of the node, from 1.
        kind: of the change.
        before: text of the node.
        after: text that replaces it.
        source: the whole file with the change.
        marks: the first line of the statement that holds the node. If the node runs on import, or
            Triton compiles it: one line in each other function of the file.
    """

    line: int
    column: int
    kind: str
    before: str
    after: str
    source: str
    marks: tuple[int, ...]


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a file, in the order of its text."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    text = source.encode()
    mutants_of_file = []
    tree = ast.parse(source)
    statements = _statements(tree, source.splitlines())
    firsts = [node for node in _first_statements(tree) if _begins(node, source.splitlines())]
    begins = tuple(statements[id(node)] for node in firsts)
    for node, kind, after in _changes(tree):
        begin = starts[node.lineno - 1] + node.col_offset
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        end = starts[node.end_lineno - 1] + node.end_col_offset
        before = text[begin:end].decode()
        changed = (text[:begin] + after.encode() + text[end:]).decode()
        statement = statements.get(id(node))
        marks = begins if statement is None else (statement,)
        mutants_of_file.append(
            Mutant(node.lineno, node.col_offset + 1, kind, before, after, changed, marks)
        )
    return sorted(mutants_of_file, key=lambda m: (m.line, m.column, m.kind))


def _statements(tree: ast.Module, text: list[str]) -> dict[int, int]:
    """The first line of the statement of each node inside a function."""
    lines: dict[int, int] = {}

    def visit(node: ast.AST, inside: bool, line: int) -> None:
        if isinstance(node, ast.stmt) and _begins(node, text):
            line = min([node.lineno, *[d.lineno for d in getattr(node, "decorator_list", [])]])
        if inside:
            lines[id(node)] = line
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _compiled(node)
        for field, value in ast.iter_fields(node):
            # Defaults and decorators run outside the function.
            within = inside or (function and field == "body")
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, within, line)

    visit(tree, False, 1)
    return lines


def _begins(node: ast.stmt, text: list[str]) -> bool:
    """True if a line may precede the statement: not in an `elif`, nor after `def f():`."""
    line = text[node.lineno - 1]
    return not line[: node.col_offset].strip() and not line.lstrip().startswith("elif ")


def _first_statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """The first statement of each function, after its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _compiled(node):
            body = node.body[ast.get_docstring(node) is not None :]
            yield from body[:1]


def _compiled(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """True if Triton compiles the function: then its executed lines are unknown."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


_Change = tuple[ast.expr | ast.stmt, str, str]


def _changes(tree: ast.Module) -> Iterator[_Change]:
    """(node, kind, replacement text) of each change."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield from _of(node)
        pending.extend(_below(node))


def _below(node: ast.AST) -> Iterator[ast.AST]:
    """The children that may be changed."""
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)):
        return
    if isinstance(node, (ast.Expr, ast.Call)) and _spoken(node):
        return
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Assign) and _assigned(node) in _SPOKEN_NAMES:
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "keywords_of_class"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.arguments):
                yield from [d for d in (*child.defaults, *child.kw_defaults) if d is not None]
            elif isinstance(child, ast.AST):
                yield child


def _spoken(node: ast.Expr | ast.Call) -> bool:
    """True if a node is a docstring, a message, or for a type checker."""
    if isinstance(node, ast.Expr):
        if isinstance(node.value, ast.Constant):
            return True
        return isinstance(node.value, ast.Call) and _spoken(node.value)
    return ast.unparse(node.func).partition(".")[0] in _SPOKEN


def _assigned(node: ast.Assign) -> str:
    """The target of an assignment, as text."""
    return ast.unparse(node.targets[0])


def _of(node: ast.AST) -> Iterator[_Change]:
    """The changes of one node."""
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        if not isinstance(node.left, ast.JoinedStr) and not _about_types(node):
            other = ast.BinOp(node.left, _BINARY[type(node.op)], node.right)
            yield node, "operator", f"({ast.unparse(other)})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        kind = "sign" if isinstance(node.op, ast.USub) else "condition"
        yield node, kind, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARED:
        ops = [_COMPARED[type(node.ops[0])], *node.ops[1:]]
        other_test = ast.Compare(node.left, ops, node.comparators)
        yield node, "comparison", f"({ast.unparse(other_test)})"
    elif isinstance(node, ast.BoolOp):
        op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield node, "condition", f"({ast.unparse(ast.BoolOp(op, node.values))})"
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield node, "constant", str(not node.value)
        elif isinstance(node.value, int):
            yield node, "constant", str(node.value + 1)
        elif isinstance(node.value, float):
            yield node, "constant", repr(node.value * 1.5 if node.value else 1.0)
    elif isinstance(node, ast.Call) and len(node.args) >= 2 and not _spoken(node):
        if ast.unparse(node.func) not in _ORDERED and not any(
            isinstance(a, ast.Starred) for a in node.args[:2]
        ):
            args = [node.args[1], node.args[0], *node.args[2:]]
            yield node, "arguments", ast.unparse(ast.Call(node.func, args, node.keywords))
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            yield node.test, "condition", f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and _does(node)):
        yield node, "statement", "pass"


def _does(node: ast.Expr) -> bool:
    """True if a statement exists for its effect: no message and no yield.

    Without its yield, a function is no generator.
    """
    return not _spoken(node) and not isinstance(node.value, (ast.Yield, ast.YieldFrom))


def _about_types(node: ast.BinOp) -> bool:
    """True if `X | Y` is a union of types."""
    return isinstance(node.op, ast.BitOr) and any(
        isinstance(side, ast.Constant) and side.value is None for side in (node.left, node.right)
    )
