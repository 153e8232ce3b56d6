"""What no fused operation may reach across."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx


class Walls:
    """The nodes of a graph that write in place or switch a mode, and the order of all of its nodes.

    A node that is added takes the place, in ``order``, of the one that it stands for.
    """

    def __init__(self, graph: fx.Graph, barriers: Sequence[fx.Node]) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.nodes = frozenset(barriers)
        self._barriers = tuple(barriers)

    def between(self, first: fx.Node, last: fx.Node) -> Iterable[fx.Node]:
        """The walls after ``first`` and before ``last``."""
        start, end = self.order[first], self.order[last]
        return (wall for wall in self._barriers if start < self.order[wall] < end)

    def first(self, nodes: Iterable[fx.Node]) -> fx.Node:
        """The earliest of ``nodes``."""
        return min(nodes, key=self.order.__getitem__)
