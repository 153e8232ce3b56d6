"""A compiled graph that ``torch.compile(...).aot_compile(...)`` can save, and load in another process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from torch import fx

try:
    from torch._dynamo.aot_compile_types import GraphModuleSerializableCallable, SerializableCallable
except ImportError as error:
    raise RuntimeError(
        "styleforge: saving a compiled function needs PyTorch 2.13 or later; save an exported program "
        "instead (sf_compile.compile, torch.export.save)"
    ) from error

import sf_compile.ops  # noqa: F401  registers the ops that a loaded graph calls


class SavedGraph(SerializableCallable):
    """A graph of fused ops; what is saved is ``graph_module``, what runs is what ``prepare`` makes of it.

    Args:
        graph_module: The rewritten graph, without submodules.
        prepare: From a graph module to what is called, in this process and in the one that loads; a function
            of a module, so that its name can be saved.
    """

    def __init__(
        self, graph_module: fx.GraphModule, prepare: Callable[[fx.GraphModule], Callable[..., Any]]
    ) -> None:
        self.graph_module = graph_module
        self.prepare = prepare
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(graph_module.graph, copies))
        self.run = prepare(fx.GraphModule(graph_module, graph))

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        """The graph as bytes; of ``prepare`` the name."""
        graph = GraphModuleSerializableCallable.serialize_compile_artifacts(
            GraphModuleSerializableCallable(fn.graph_module)
        )
        return pickle.dumps((graph, fn.prepare))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        """What ``serialize_compile_artifacts`` was given, in another process."""
        graph, prepare = pickle.loads(data)
        return cls(GraphModuleSerializableCallable.deserialize_compile_artifacts(graph).graph_module, prepare)

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        return self.run(*args)
