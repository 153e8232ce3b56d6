"""The forms that a norm by a picture's own statistics has in a graph, without the affine after it.

(x - mean) / deviation,  (x - mean) * 1 / deviation, either with a weight inside
a batch norm in training of x.view(1, N C, H, W), as MUNIT spells AdaIN
a norm of PyTorch's without weight and bias
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sf_compile.graph import signatures, spelling
from sf_compile.graph.deviation import Centred, Deviation, centred, deviation, inverse_deviation, spreads
from sf_compile.graph.expressions import is_number, read, unexpanded, views
from sf_compile.graph.norm_affine import Vector, vector_of, vectors_of
from sf_compile.graph.values import same_shape, value_of, whole_images
from sf_compile.graph.walls import Walls

# Below it the square of an eps beside the root is lost in float32.
_LEAST_OUTER_EPS = 1e-18


@dataclass(frozen=True)
class NormForm:
    """A norm of ``picture`` (N, C, H, W) that ends with ``end``; ``nodes`` compute it, and are its own.

    ``groups``, ``correction``, ``eps`` and ``outer_eps`` are those of ``picture_norm``. ``known`` says that
    the matcher knows it as it is: then only what follows is of interest.
    """

    picture: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...] = ()
    groups: int | None = None
    correction: Any = 0
    eps: Any = 0.0
    outer_eps: Any = None
    weight: Vector | None = None
    bias: Vector | None = None
    known: bool = False


def norm_at(node: fx.Node, walls: Walls) -> NormForm | str | None:
    """The norm that ``node`` computes; a reason for what is near one, and None for anything else."""
    if not isinstance(value_of(node), Tensor):
        return None
    canonical = signatures.canonical(node)
    if canonical is not None:
        if canonical.target is spelling.BATCH_NORM:
            return _batch_norm(node, canonical.args, walls)
        return _known(node, canonical)
    call = read(node)
    if call is None or call.name not in ("mul", "div"):
        return None
    first, second = call.arguments
    for numerator, root in ((first, second), (second, first)) if call.name == "mul" else ((first, second),):
        found = _spelled_out(node, numerator, root, call.name)
        if found is not None:
            return _weighted(node, *found, walls)
    return None


def _numerators(node: Any) -> Iterator[tuple[Any, Any, tuple[fx.Node, ...]]]:
    """(x - mean, a weight, nodes) of what may be the one multiplied by the other; the weight may be None."""
    yield node, None, ()
    call = read(node)
    if call is not None and call.name == "mul" and value_of(node).dim() == 4:
        first, second = call.arguments
        yield first, second, (node,)
        yield second, first, (node,)


def _roots(node: Any, name: str) -> Iterator[tuple[Deviation | str | None, Any, Any, tuple[fx.Node, ...]]]:
    """The deviation that ``name`` (div or mul) brings below, its node, a weight beside it, and nodes."""
    if name == "div":
        yield deviation(node), node, None, ()
        return
    yield inverse_deviation(node), node, None, ()
    call = read(node)
    if call is None or value_of(node).dim() != 4:
        return
    if call.name == "mul":
        for inverse, weight in (call.arguments, call.arguments[::-1]):
            yield inverse_deviation(inverse), inverse, weight, (node,)
    elif call.name == "div":
        yield deviation(call.arguments[1]), call.arguments[1], call.arguments[0], (node,)


def _spelled_out(
    node: fx.Node, numerator: Any, root: Any, name: str
) -> tuple[NormForm | str, fx.Node | None] | None:
    """(x - mean) over (``div``), or times the inverse of (``mul``), a deviation; and the weight inside."""
    spread = unexpanded(root)
    for factor, weight, nodes in _numerators(numerator):
        top = centred(factor)
        if top is None:
            continue
        for below, at, scale, more in _roots(spread[-1], name):
            if below is None or (weight is not None and scale is not None):
                continue
            if isinstance(top, str) or isinstance(below, str):
                return top if isinstance(top, str) else str(below), None
            own = (*nodes, *spread, *more, *below.nodes)
            return _fitted(node, factor, top, at, below._replace(nodes=own)), weight or scale
    return None


def _weighted(node: fx.Node, norm: NormForm | str, weight: fx.Node | None, walls: Walls) -> NormForm | str:
    """``norm`` with the weight inside of it."""
    if isinstance(norm, str) or weight is None:
        return norm
    vector = vector_of(weight, value_of(norm.picture), node, walls)
    if norm.end is not node or not isinstance(vector, Vector):
        return "a weight inside of the norm that is not one number a channel"
    return replace(norm, weight=vector)


def _fitted(node: fx.Node, factor: fx.Node, top: Centred, root: fx.Node, below: Deviation) -> NormForm | str:
    """The norm of ``factor``, x - mean, and of a deviation at ``root``, if they belong together."""
    variance = below.variance
    if views(variance.of)[-1] is factor:  # the mean does not matter to the variance
        variance = variance._replace(of=top.of)
    if not top.mean.matches(variance):
        return "mean and variance are of different tensors or pixels"
    small = root if below.small is None else below.small
    sized = below.small is None or same_shape(value_of(root), value_of(factor))
    if not sized or not spreads(small, factor, variance.count):
        return "a standard deviation that is not broadcast over its own pixels"
    outer = below.outer_eps
    if isinstance(outer, int | float) and not (outer == 0 or outer >= _LEAST_OUTER_EPS):
        return f"an eps of {outer} beside the root"
    nodes = (*top.nodes, *below.nodes)
    end: fx.Node | None = node
    picture = _picture(top.of, node)
    if picture is None:
        end, nodes = _view_after(node), (*nodes, node)
        picture = _picture(top.of, end)
    if picture is None or end is None:
        return "a norm of what is no picture (N, C, H, W), or does not become one again"
    groups = _groups(variance.count, value_of(variance.of).shape, value_of(picture).shape)
    if isinstance(groups, str):
        return groups
    return NormForm(picture, end, nodes, groups or None, variance.correction, below.eps, outer)


def _picture(node: fx.Node, end: fx.Node | None) -> fx.Node | None:
    """What ``node`` is a view of that has the shape (N, C, H, W) of ``end``, the first that was made."""
    if end is None or value_of(end).dim() != 4:
        return None
    return next((x for x in reversed(views(node)) if same_shape(value_of(x), value_of(end))), None)


def _view_after(node: fx.Node) -> fx.Node | None:
    """The only reader of ``node``, if it is a view."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    call = read(reader)
    return reader if call is not None and call.name == "view" else None


def _groups(count: Any, shape: Sequence[Any], picture: Sequence[Any]) -> int | str:
    """In how many groups of channels ``count`` statistics of (N, C, H, W) are; 0 for one of each channel."""
    n, c = picture[:2]
    if statically_known_true(count == n * c):
        return 0
    if statically_known_true(count == n):
        return 1
    for groups in shape:
        divides = isinstance(groups, int) and isinstance(c, int) and groups and c % groups == 0
        if divides and statically_known_true(count == n * groups):
            return groups
    return f"{count} statistics of {n} images of {c} channels"


def _batch_norm(node: fx.Node, arguments: tuple[Any, ...], walls: Walls) -> NormForm | str | None:
    """A batch norm in training of one image, whose channels are those of all images of a picture."""
    input, mean, variance, weight, bias, training, _, eps = arguments
    value = value_of(input)
    if training is not True or value is None or not statically_known_true(value.shape[0] == 1):
        return None
    kept = tuple(x for x in (mean, variance) if x is not None)
    if not all(_is_copy(x) and set(x.users) == {node} for x in kept):
        return "batch norm in training updates its running statistics"
    for end in (_view_after(node), node):
        picture = _picture(input, end)
        if picture is not None and end is not None and isinstance(value_of(picture).shape[1], int):
            vectors = vectors_of((weight, bias), value_of(picture), node, walls)
            nodes = kept if end is node else (*kept, node)
            return NormForm(picture, end, nodes, eps=eps, weight=vectors[0], bias=vectors[1])
    return None


def _is_copy(node: fx.Node) -> bool:
    """Whether ``node`` is memory of its own, so that nobody else sees what is written into it."""
    return node.op == "call_method" and node.target in ("repeat", "clone")


def _known(node: fx.Node, canonical: spelling.Spelling) -> NormForm | None:
    """A norm by own statistics, without weight and bias, that the matcher knows."""
    value = value_of(canonical.args[0])
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    if canonical.target is spelling.INSTANCE_NORM:
        input, mean, _, weight, bias, own, _, eps = canonical.args
        plain, groups = own is True and mean is None, None
    elif canonical.target is spelling.GROUP_NORM:
        input, groups, weight, bias, eps = canonical.args
        plain = is_number(groups) and isinstance(groups, int)
    elif canonical.target is spelling.LAYER_NORM:
        input, shape, weight, bias, eps = canonical.args
        plain, groups = whole_images(shape, value), 1
    else:
        return None
    if not plain or weight is not None or bias is not None:
        return None
    return NormForm(input, node, groups=groups, eps=eps, known=True)
