"""Arithmetic in a graph, read in one form whatever its spelling, for the rules about hand-written norms.

``a / b``, ``torch.div(a, b)``, ``a.div_(b)`` are one operation with one list of arguments. Nothing here
changes a graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from sf_compile.graph.values import value_of


class Call(NamedTuple):
    """An operation by its name in ``torch``, and its arguments.

    The arguments are (a, b) of add, sub, mul, div and pow; (a,) of sqrt, rsqrt, reciprocal and square;
    (input, dims, correction) of mean, sum, var, std, var_mean and std_mean, where dims None are all and only
    the last four have a correction; (input,) of a view, which keeps the order of the elements, and of an
    expand.
    """

    name: str
    arguments: tuple[Any, ...]
    inplace: bool = False


# Each function below has the arguments of an operation as PyTorch documents them. A call that does not fit
# raises TypeError, and is not read.


def _unary(a: Any) -> tuple[Any, ...]:
    return (a,)


def _scaled(a: Any, b: Any, *, alpha: Any = 1) -> tuple[Any, ...] | None:
    return (a, b) if alpha == 1 else None


def _binary(a: Any, b: Any) -> tuple[Any, ...]:
    return a, b


def _reversed(a: Any, b: Any) -> tuple[Any, ...]:
    return b, a


def _div(a: Any, b: Any, *, rounding_mode: Any = None) -> tuple[Any, ...] | None:
    return (a, b) if rounding_mode is None else None


def _sum(input: Any, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> tuple[Any, ...] | None:
    return (input, dim, 0) if dtype is None else None


def _variance(
    input: Any, dim: Any = None, unbiased: Any = None, keepdim: Any = False, *, correction: Any = None
) -> tuple[Any, ...] | None:
    if isinstance(dim, bool):  # x.var(False)
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    return (input, dim, correction) if isinstance(correction, int | float) else None


def _view(input: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
    return (input,)


_SIGNATURES: dict[str, Callable[..., tuple[Any, ...] | None]] = {
    "add": _scaled, "sub": _scaled, "mul": _binary, "div": _div, "pow": _binary,
    "sqrt": _unary, "rsqrt": _unary, "reciprocal": _unary, "square": _unary,
    "mean": _sum, "sum": _sum, "var": _variance, "std": _variance, "var_mean": _variance,
    "std_mean": _variance,
}  # fmt: skip
_ALIASES = {"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div"}
_OPERATORS = ("add", "sub", "mul", "truediv", "pow")
_VIEWS = (
    "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "view_as", "reshape_as",
)  # fmt: skip
_EXPANDS = ("expand", "expand_as", "broadcast_to")


def _name(spelled: str) -> tuple[str, bool]:
    """The name of an operation as ``_SIGNATURES`` has it, and whether it is in place."""
    inplace = spelled.endswith("_")
    plain = spelled.rstrip("_")
    return _ALIASES.get(plain, plain), inplace


def _functions() -> dict[Any, tuple[str, bool]]:
    found: dict[Any, tuple[str, bool]] = {}
    for spelled in (*_SIGNATURES, *_ALIASES):
        for suffix in ("", "_"):
            function = getattr(torch, spelled + suffix, None)
            if function is not None:
                found[function] = _name(spelled + suffix)
    for spelled in _OPERATORS:
        name, _ = _name(spelled)
        found[getattr(operator, spelled)] = name, False
        found[getattr(operator, "i" + spelled)] = name, True
    return found


_FUNCTIONS = _functions()
_VIEW_FUNCTIONS = {getattr(torch, name): "view" for name in _VIEWS if hasattr(torch, name)} | {
    torch.broadcast_to: "expand"
}


def read(node: Any) -> Call | None:
    """What ``node`` computes; None for anything that has no name here, or takes or returns something else."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target is operator.getitem:
        return _read_item(node)
    name, inplace = _named(node)
    if name in ("view", "expand"):
        kept = isinstance(value_of(node.args[0] if node.args else None), Tensor) and _same_dtype(node)
        return Call(name, (node.args[0],)) if kept else None
    signature = _SIGNATURES.get(name)
    if signature is None:
        return None
    if node.op == "call_method" and str(node.target).startswith("__r"):
        signature = _reversed
    try:
        arguments = signature(*node.args, **node.kwargs)
    except TypeError:
        return None
    return None if arguments is None else Call(name, arguments, inplace)


def _named(node: fx.Node) -> tuple[str, bool]:
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target) or (_VIEW_FUNCTIONS.get(node.target, ""), False)
    target = str(node.target)
    if target in _VIEWS:
        return "view", False
    if target in _EXPANDS:
        return "expand", False
    if target.startswith("__"):  # __rsub__, __itruediv__
        bare = target.strip("_")
        for prefix in ("", "r", "i"):
            if bare.removeprefix(prefix) in _OPERATORS and bare.startswith(prefix):
                return _name(bare.removeprefix(prefix))[0], prefix == "i"
    return _name(target)


def _same_dtype(node: fx.Node) -> bool:
    """Whether a view is none of the bits in another dtype."""
    value, source = value_of(node), value_of(node.args[0])
    return isinstance(value, Tensor) and value.dtype == source.dtype


def _read_item(node: fx.Node) -> Call | None:
    """``x[:, :, None]`` is a view; an item of ``torch.var_mean`` is the statistic of that name."""
    source, index = node.args
    if isinstance(value_of(source), Tensor):
        parts = index if isinstance(index, tuple) else (index,)
        whole = all(part is None or part is Ellipsis or part == slice(None) for part in parts)
        return Call("view", (source,)) if whole else None
    both = read(source)
    if both is None or both.name not in ("var_mean", "std_mean") or index not in (0, 1):
        return None
    if index == 1:
        return Call("mean", (*both.arguments[:2], 0))
    return Call(both.name.removesuffix("_mean"), both.arguments)


def views(node: Any) -> list[fx.Node]:
    """``node`` and what it is a view of, in turn, all of the same elements in the same order."""
    found = [node]
    while (call := read(found[-1])) is not None and call.name == "view":
        found.append(call.arguments[0])
    return found


def unexpanded(node: Any) -> list[fx.Node]:
    """``node`` and what it is an expansion of, in turn."""
    found = [node]
    while (call := read(found[-1])) is not None and call.name == "expand":
        found.append(call.arguments[0])
    return found


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read the elements of ``node``, not its shape alone."""
    return [user for user in node.users if not reads_shape(user, node)]


def reads_shape(reader: fx.Node, node: fx.Node) -> bool:
    """Whether any tensor of the shape of ``node`` would do for ``reader``."""
    if reader.op != "call_method":
        return False
    like = reader.target in ("expand_as", "view_as", "reshape_as") and reader.args[0] is not node
    return like or reader.target in ("size", "dim")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number, or a node that stands for one."""
    known = value_of(value) if isinstance(value, fx.Node) else value
    return isinstance(known, int | float | torch.SymInt | torch.SymFloat) and not isinstance(known, bool)


def number(value: Any) -> Any:
    """The number, maybe symbolic, that ``is_number`` saw."""
    return value_of(value) if isinstance(value, fx.Node) else value


def product(sizes: Sequence[Any]) -> Any:
    """Of sizes that may be symbolic; 1 of none."""
    return math.prod(sizes)
