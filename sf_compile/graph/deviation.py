"""Reading mean and standard deviation out of arithmetic: of what, over how much of it, and with which eps.

A statistic is over the last dimensions of a tensor, and a view keeps the order of the elements: so which
pixels belong together is told by how many statistics there are, whatever the shape that the model gave them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sf_compile.graph.expressions import Call, is_number, number, product, read, unexpanded, views
from sf_compile.graph.values import same_shape, same_sizes, value_of


class Reduction(NamedTuple):
    """``count`` statistics over the last dimensions of ``of``, each of ``pixels`` elements.

    ``of`` is a picture, or a view of one; ``correction`` is what was taken off n. ``nodes`` compute it.
    """

    name: str
    of: fx.Node
    count: Any
    pixels: Any
    correction: Any
    nodes: tuple[fx.Node, ...]

    def matches(self, other: Reduction) -> bool:
        """Whether both are over the same elements of the same tensor."""
        return views(self.of)[-1] is views(other.of)[-1] and statically_known_true(self.count == other.count)


class Deviation(NamedTuple):
    """sqrt(variance + eps) + outer_eps, of the pixels and with the correction of ``variance``.

    ``small`` is the variance before it was expanded to the size of the picture, if it was.
    """

    variance: Reduction
    eps: Any = 0.0
    outer_eps: Any = None
    nodes: tuple[fx.Node, ...] = ()
    small: fx.Node | None = None


def reduction(node: Any, *names: str) -> Reduction | str | None:
    """A mean, sum, variance or standard deviation of one of ``names``, or a view of it.

    Returns None for anything else, and a reason for a reduction over other than the last dimensions.
    """
    path = views(node)
    call = read(path[-1])
    if call is None or call.name not in names:
        return None
    of, dims, correction = call.arguments
    value = value_of(of)
    if value is None:
        return None
    shape = value.shape
    wanted = range(len(shape)) if dims is None else (dims,) if isinstance(dims, int) else dims
    if not isinstance(wanted, tuple | list | range) or not all(isinstance(dim, int) for dim in wanted):
        return "statistics over dimensions that are not constants"
    reduced = sorted(dim % len(shape) for dim in wanted)
    if not reduced or reduced != list(range(len(shape) - len(reduced), len(shape))):
        return f"statistics over the dimensions {tuple(reduced)} of {len(shape)}"
    kept = len(shape) - len(reduced)
    return Reduction(call.name, of, product(shape[:kept]), product(shape[kept:]), correction, tuple(path))


def _mean(node: Any) -> Reduction | str | None:
    """A mean, or a sum divided by n, or by less: then that is the correction."""
    found = reduction(node, "mean")
    if found is not None:
        return found
    path = views(node)
    call = read(path[-1])
    if call is None or call.name != "div" or not is_number(call.arguments[1]):
        return None
    total = reduction(call.arguments[0], "sum")
    if not isinstance(total, Reduction):
        return total
    for correction in (0, 1):
        if statically_known_true(number(call.arguments[1]) == total.pixels - correction):
            return total._replace(name="mean", correction=correction, nodes=(*path, *total.nodes))
    return f"a sum over {total.pixels} pixels divided by {number(call.arguments[1])}"


def mean(node: Any) -> Reduction | str | None:
    """The mean of pixels."""
    found = _mean(node)
    return "a sum divided by less than n" if isinstance(found, Reduction) and found.correction else found


class Centred(NamedTuple):
    """``of`` less its mean; ``nodes`` compute it."""

    of: fx.Node
    mean: Reduction
    nodes: tuple[fx.Node, ...]


def centred(node: Any) -> Centred | str | None:
    """x - mean(x)."""
    call = read(node)
    if call is None or call.name != "sub":
        return None
    of, subtracted = call.arguments
    if not isinstance(of, fx.Node) or not isinstance(subtracted, fx.Node):
        return None
    spread = unexpanded(subtracted)
    found = mean(spread[-1])
    if not isinstance(found, Reduction):
        return found
    if views(of)[-1] is not views(found.of)[-1]:
        return "the mean of another tensor is subtracted"
    if not spreads(spread[-1], of, found.count):
        return "a mean that is not broadcast over its own pixels"
    return Centred(of, found, (node, *spread, *found.nodes))


def _square_of(node: Any) -> Any:
    """The x of x^2; None for anything else."""
    call = read(node)
    if call is None:
        return None
    a, *b = call.arguments
    same = call.name == "mul" and b[0] is a
    return a if same or call.name == "square" or (call.name == "pow" and b[0] == 2) else None


def _behind_views(node: Any) -> tuple[Call | None, tuple[fx.Node, ...]]:
    """The call that ``node`` is a view of, and the nodes up to it."""
    path = views(node)
    return read(path[-1]), tuple(path)


def _variance(node: Any) -> Deviation | str | None:
    """A variance, what was added to it, and whether it was expanded to the size of the picture before."""
    spread = unexpanded(node)
    if len(spread) > 1:
        found = _variance(spread[-1])
        if not isinstance(found, Deviation) or found.small is not None:
            return found
        return found._replace(small=spread[-1], nodes=(*spread, *found.nodes))
    call, nodes = _behind_views(node)
    if call is None:
        return None
    if call.name == "add":
        return _with_eps(call, nodes)
    if call.name == "mul":
        return _put_right(call, nodes)
    if call.name == "var":
        variance = reduction(nodes[-1], "var")
        return Deviation(variance, nodes=nodes) if isinstance(variance, Reduction) else variance
    if call.name == "sub":
        return _difference_of_squares(call, nodes)
    squares = _mean(nodes[-1])
    if not isinstance(squares, Reduction):
        return squares
    squared = _square_of(views(squares.of)[-1])
    of = centred(views(squared)[-1]) if squared is not None else None
    if not isinstance(of, Centred):
        return of
    if not statically_known_true(of.mean.count == squares.count):
        return "the squares are averaged over other pixels than their mean"
    inner = (*views(squares.of), *views(squared), *of.nodes)
    return Deviation(squares._replace(of=of.of), nodes=(*nodes, *squares.nodes, *inner))


def _with_eps(call: Call, nodes: tuple[fx.Node, ...]) -> Deviation | str | None:
    for inner, eps in (call.arguments, call.arguments[::-1]):
        if is_number(eps):
            found = _variance(inner)
            if not isinstance(found, Deviation):
                return found
            if is_number(found.eps) and found.eps == 0.0:
                return found._replace(eps=eps, nodes=(*nodes, *found.nodes))
            return "two numbers added to the variance"
    return None


def _put_right(call: Call, nodes: tuple[fx.Node, ...]) -> Deviation | str | None:
    """An unbiased variance times (n - 1) / n: the biased one."""
    for inner, factor in (call.arguments, call.arguments[::-1]):
        if not is_number(factor):
            continue
        found = _variance(inner)
        if not isinstance(found, Deviation):
            return found
        pixels = found.variance.pixels
        if found.variance.correction != 1 or not (is_number(found.eps) and found.eps == 0.0):
            return "a number times the variance"
        if not statically_known_true(number(factor) == (pixels - 1) / pixels):
            return "a number times the variance, other than (n - 1) / n"
        return found._replace(variance=found.variance._replace(correction=0), nodes=(*nodes, *found.nodes))
    return None


def _difference_of_squares(call: Call, nodes: tuple[fx.Node, ...]) -> Deviation | str | None:
    """E[x^2] - E[x]^2."""
    squares, squared_mean = mean(call.arguments[0]), _square_of(views(call.arguments[1])[-1])
    average = mean(squared_mean) if squared_mean is not None else None
    if not isinstance(squares, Reduction) or not isinstance(average, Reduction):
        return None
    of = _square_of(views(squares.of)[-1])
    if of is None or not same_shape(value_of(call.arguments[0]), value_of(call.arguments[1])):
        return None
    variance = squares._replace(of=of)
    if not variance.matches(average):
        return "the mean of the squares and the mean are of different pixels"
    inner = (*squares.nodes, *views(squares.of), *views(call.arguments[1]), *average.nodes)
    return Deviation(variance, nodes=(*nodes, *inner))


def deviation(node: Any) -> Deviation | str | None:
    """sqrt(variance + eps) + outer_eps; None for anything else, a reason for something near it."""
    call, nodes = _behind_views(node)
    if call is None:
        return None
    if call.name == "std":
        found = reduction(nodes[-1], "std")
        return Deviation(found, nodes=nodes) if isinstance(found, Reduction) else found
    if call.name == "add":
        for inner, eps in (call.arguments, call.arguments[::-1]):
            if is_number(eps):
                root = deviation(inner)
                if not isinstance(root, Deviation):
                    return root
                if root.outer_eps is not None or root.eps != 0.0:
                    return "an eps inside of the root and another one outside"
                return root._replace(outer_eps=eps, nodes=(*nodes, *root.nodes))
        return None
    if call.name == "sqrt" or (call.name == "pow" and call.arguments[1] == 0.5):
        variance = _variance(call.arguments[0])
        return variance if not isinstance(variance, Deviation) else _through(nodes, variance)
    return None


def inverse_deviation(node: Any) -> Deviation | str | None:
    """1 / (sqrt(variance + eps) + outer_eps)."""
    path = views(node)
    call = read(path[-1])
    if call is None:
        return None
    inner: Deviation | str | None = None
    if call.name == "rsqrt" or (call.name == "pow" and call.arguments[1] == -0.5):
        inner = _variance(call.arguments[0])
    elif call.name == "reciprocal" or (call.name == "pow" and call.arguments[1] == -1):
        inner = deviation(call.arguments[0])
    elif call.name == "div" and is_number(call.arguments[0]) and call.arguments[0] == 1:
        inner = deviation(call.arguments[1])
    return _through(tuple(path), inner) if isinstance(inner, Deviation) else inner


def _through(nodes: tuple[fx.Node, ...], found: Deviation) -> Deviation:
    return found._replace(nodes=(*nodes, *found.nodes))


def spreads(statistic: fx.Node, picture: fx.Node, count: Any) -> bool:
    """Whether each of ``count`` statistics surely meets its own pixels when broadcast over ``picture``."""
    small, large = value_of(statistic).shape, value_of(picture).shape
    if len(small) > len(large) or not statically_known_true(product(small) == count):
        return False
    small = (*(1 for _ in range(len(large) - len(small))), *small)
    kept = len(large)
    while kept and statically_known_true(small[kept - 1] == 1):
        kept -= 1
    return same_sizes(small[:kept], large[:kept])
