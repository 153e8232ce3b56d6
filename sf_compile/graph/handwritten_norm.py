"""Norms that a model spells out, each put into one canonical node.

    mean, var = x.mean((2, 3), True), x.var((2, 3), keepdim=True)
    weight * (x - mean) / (var + eps).sqrt() + bias           =>   picture_norm(x, weight, bias, ...)

So are the other forms of ``norm_forms``, and an affine by other operations after a norm without one. What
looks like a norm and is none is left alone, with the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from sf_compile.graph import spelling
from sf_compile.graph.expressions import is_number, read, readers, reads_shape, views
from sf_compile.graph.norm_affine import Affine, follow
from sf_compile.graph.norm_forms import NormForm, norm_at
from sf_compile.graph.picture_norm import picture_norm
from sf_compile.graph.values import AUTOCAST, Miss, dense, same_shape, value_of
from sf_compile.graph.walls import Walls

log = logging.getLogger(__name__)


def gather(graph: fx.Graph, barriers: Sequence[fx.Node]) -> list[Miss]:
    """Put every hand-written norm of ``graph`` into one node; returns what was left alone, and why.

    ``barriers`` are the nodes that write in place or switch a mode.
    """
    walls = Walls(graph, barriers)
    misses: list[Miss] = []
    gone: set[fx.Node] = set()
    for node in list(graph.nodes):
        norm = None if node in gone else norm_at(node, walls)
        if isinstance(norm, str):
            misses.append(Miss(node.name, norm))
        elif norm is not None:
            affine = follow(Affine(norm.end, norm.weight, norm.bias), value_of(norm.picture), walls)
            misses += affine.misses
            if norm.known and affine.end is node:
                continue
            reason = _refusal(norm, affine, walls)
            if reason is None:
                gone |= _replace(graph, norm, affine, walls)
            else:
                misses.append(Miss(affine.end.name if norm.known else node.name, reason))
    return misses


def _refusal(norm: NormForm, affine: Affine, walls: Walls) -> str | None:
    """Why a norm that was found is left as it is; None where it is not."""
    inside = {*norm.nodes, *affine.nodes}
    end = affine.end
    value, picture = value_of(end), value_of(norm.picture)
    if value.dtype != picture.dtype:
        return f"a norm of {picture.dtype} in {value.dtype}"
    if not dense(value):
        return "a norm whose result is neither contiguous nor channels_last"
    if torch.is_autocast_enabled(picture.device.type) or any(AUTOCAST in x.meta for x in (*inside, end)):
        return "autocast around a hand-written norm"
    for node in (*norm.nodes, *affine.nodes):
        others = [user.name for user in readers(node) if user not in inside and user is not end]
        if others:
            return f"{node.name} of the norm is also read by {others[0]}"
    first = walls.first((*inside, end, *_views_of(norm.picture, (*inside, end))))
    for wall in (*walls.between(first, end), *({first, end} & walls.nodes)):
        if not _is_own_write(wall, inside, end, walls):
            return f"{wall.name} writes in place, or switches a mode, inside the norm"
    return None


def _views_of(picture: fx.Node, readers: Iterable[fx.Node]) -> set[fx.Node]:
    """The views of ``picture`` that ``readers`` read: a view that is a copy shows what was there before."""
    paths = (views(node) for reader in readers for node in reader.all_input_nodes)
    return {node for path in paths if picture in path for node in path[: path.index(picture)]}


def _is_own_write(wall: fx.Node, inside: set[fx.Node], end: fx.Node, walls: Walls) -> bool:
    """Whether ``wall`` is arithmetic of the norm that writes into an intermediate which is not read again."""
    call = read(wall)
    if call is None or not call.inplace or (wall not in inside and wall is not end):
        return False
    base = call.arguments[0]
    made = read(base)
    fresh = base.target in spelling.FRESH or (made is not None and made.name not in ("view", "expand"))
    return base in inside and fresh and all(walls.order[user] <= walls.order[wall] for user in base.users)


def _replace(graph: fx.Graph, norm: NormForm, affine: Affine, walls: Walls) -> set[fx.Node]:
    """Put ``picture_norm`` in the place of ``norm`` and ``affine``; returns the nodes that are gone."""
    end = affine.end
    vectors = (affine.weight, affine.bias)
    placed = [None if vector is None else vector.placed(graph, end, walls) for vector in vectors]
    with graph.inserting_before(end):
        numbers = (norm.groups, norm.correction, norm.eps, norm.outer_eps)
        made = graph.call_function(picture_norm, (norm.picture, *placed, *numbers))
    made.meta.update(end.meta)
    end.replace_all_uses_with(made)
    walls.order[made] = walls.order[end]
    log.debug("hand-written norm: %s", made)
    inside = {*norm.nodes, *affine.nodes}
    for node in inside:
        for user in list(node.users):
            if reads_shape(user, node) and same_shape(value_of(node), value_of(norm.picture)):
                user.replace_input_with(node, norm.picture)
    return _erase(graph, end, inside)


def _erase(graph: fx.Graph, node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """Erase ``node``, what is ``inside``, and what only they needed; returns the erased nodes."""
    gone: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node in gone or node.users:
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        gone.add(node)
        waiting += [x for x in inputs if x in inside or _is_pure(x)]
    return gone


def _is_pure(node: fx.Node) -> bool:
    """Whether nobody misses ``node`` once nothing reads it: arithmetic, a view, or a size."""
    if node.op not in ("call_function", "call_method"):
        return False
    call = read(node)
    if call is not None:
        return not call.inplace
    return node.target != "item" and (is_number(node) or isinstance(value_of(node), torch.Size))
