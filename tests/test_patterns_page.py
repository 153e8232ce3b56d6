"""docs/patterns.md has a line for every reason that the code can give."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "patterns.md"
SOURCES = sorted((ROOT / "sf_compile" / "graph").glob("*.py"))


def text(node: ast.expr | None) -> str | None:
    """A string or f-string with … for every value in it; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left)  # what is added says more, it is not another reason
    return None


def given(tree: ast.Module) -> Iterator[str | None]:
    """What stands where a reason does: the second argument of ``Miss``, and what ``-> … | str`` returns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Miss":
            yield text(node.args[1])
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            kind = ast.unparse(node.returns)
            if kind == "str" or "str" not in kind:
                continue
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return):
                    values = inner.value.elts if isinstance(inner.value, ast.Tuple) else [inner.value]
                    for value in values:
                        either = value.body if isinstance(value, ast.IfExp) else value
                        yield text(either.values[-1] if isinstance(either, ast.BoolOp) else either)


def reasons() -> dict[str, str]:
    """Every reason, and the file that gives it."""
    found = {}
    for path in SOURCES:
        for reason in given(ast.parse(path.read_text(encoding="utf-8"))):
            if reason is not None and " " in reason and not reason.startswith("normalised on the way"):
                found[reason] = path.name
    return found


@pytest.mark.parametrize("reason", reasons())
def test_every_reason_has_a_line(reason):
    assert f"| `{reason}` |" in PAGE.read_text(encoding="utf-8"), f"{reasons()[reason]} says: {reason}"


def test_reasons_are_found():
    """The search itself: one of each form in which the sources give a reason."""
    assert {
        "negative padding, a crop",
        "grouped … (groups=…)",
        "a convolution with nothing around it that fusion saves",
        "also read by …",
        "normalised at its end: no fused convolution reads it",
        "… writes in place, or switches a mode, between … and …",
    } <= set(reasons())
