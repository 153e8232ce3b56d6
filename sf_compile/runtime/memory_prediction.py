"""How much memory a call needs at its peak, told before it runs.

A graph is run once with fake tensors, which have sizes and no memory. Then every tensor has a lifetime: from
the operation that makes it to the last that reads it. Within a region tensors lie in an arena that is planned
as ``sf_compile.cuda.arena`` plans it for the kernels; around regions they come and go one by one.

What operations of PyTorch take for themselves while they run is not known before: ``exact`` is false where a
graph has such, of which cuDNN's convolutions may take most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sf_compile.runtime.convolution_memory import Convolution, finished_apart, packed, workspaces
from sf_compile.runtime.memory import Memory

_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast


def predict(gm: fx.GraphModule, inputs: Sequence[Any], bound: Collection[int] = ()) -> Memory:
    """What a call of ``gm`` with ``inputs`` needs on a GPU; without gradients, which keep more.

    Nothing is computed, and no GPU is needed.

    Args:
        gm: A graph in which sites were replaced by ``styleforge`` ops, its regions made or not.
        inputs: Tensors, of which sizes, strides, dtypes and devices are read (fake ones will do); numbers.
        bound: Those, by number, that are not the call's own, in addition to parameters.

    Raises:
        RuntimeError: the graph does not run on such inputs, or sizes depend on numbers in a tensor.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    own = [isinstance(x, Tensor) and _is_own(x) and i not in bound for i, x in enumerate(inputs)]
    with torch.inference_mode(False), torch.no_grad(), mode:
        fakes = [_fake(x) for x in inputs]
        run = _Run(gm)
        with run.autocast():
            run.run(*fakes)
    given = _storages([x for x, counted in zip(fakes, own, strict=True) if counted])
    found = _Steps(gm, run, set(_storages(fakes)))
    return replace(
        found.memory(), input=sum(given.values()), packed_weights=sum(map(packed, run.convolutions)),
        workspaces=workspaces(run.convolutions),
    )  # fmt: skip


def _is_own(x: Tensor) -> bool:
    return not isinstance(x, torch.nn.Parameter)


def _fake(x: Any) -> Any:
    if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool):
        return x.node.hint
    if not isinstance(x, Tensor):
        return x
    sizes, strides = ([_hint(one) for one in many] for many in (x.shape, x.stride()))
    return torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device)


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


class _Run(fx.Interpreter):
    """Runs a graph with fake tensors, the insides of its regions too, and keeps every value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.gm = gm
        self.extra_traceback = False
        self.values: dict[fx.Node, Any] = {}
        self.inner: dict[fx.Node, _Run] = {}
        self.convolutions: list[Convolution] = []
        self.temporary: dict[fx.Node, int] = {}
        self.exact = True
        self._entered: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, as ``fx.Interpreter`` has it."""
        value = self.values[n] = super().run_node(n)
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload):
            self._note(n, value)
        elif n.op.startswith("call") and n not in self.inner and n.target is not getitem:
            self.exact = False
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a region returns, by its ops one by one."""
        module = self.fetch_attr(target)
        graph = getattr(module, "inner", None)
        if not isinstance(graph, fx.GraphModule):
            return super().call_module(target, args, kwargs)
        inner = _Run(graph)
        (node,) = [n for n in self.gm.graph.nodes if n.op == "call_module" and n.target == target]
        self.inner[node] = inner
        result = inner.run(*args)
        self.convolutions += inner.convolutions
        self.exact = self.exact and inner.exact
        return result

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a method returns; of a number that Dynamo keeps in a tensor, any number of its kind."""
        x = args[0]
        if target == "item" and isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() == 0:
            return 1.0 if x.dtype.is_floating_point else 1
        return super().call_method(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function returns; autocast is left in the end, whatever happens."""
        result = super().call_function(target, args, kwargs)
        if target is _ENTER_AUTOCAST:
            self._entered.append(result)
        elif target is _EXIT_AUTOCAST:
            self._entered.remove(args[0])
        return result

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Around ``run``."""
        try:
            yield
        finally:
            while self._entered:
                _EXIT_AUTOCAST(self._entered.pop())

    def _note(self, node: fx.Node, value: Any) -> None:
        """What an op takes beside its results, and what it keeps."""
        target: Any = node.target
        name = target.name()
        if not name.startswith("styleforge::"):
            self.exact = False
            return
        arguments = dict(zip([a.name for a in target._schema.arguments], self._arguments(node), strict=False))
        if name == "styleforge::residual_trunk":
            x, weights, scales = (arguments[name] for name in ("input", "weights", "input_scales"))
            # Through which the blocks exchange rows; and where calls multiply integers, these.
            self.temporary[node] = _bytes(x) + (x.numel() if scales else 0)
            for weight, scale in zip(weights, scales or [None] * len(weights), strict=True):
                like = {"input": x, "weight": weight, "upsample": 1, "transposed": False}
                like |= {"statistics": True, "input_scale": scale}
                self.convolutions.append(Convolution(like, value[0]))
        elif name == "styleforge::conv2d":
            convolution = Convolution({"transposed": False, **arguments}, value[0])
            self.convolutions.append(convolution)
            self.temporary[node] = finished_apart(convolution)
            self.exact = self.exact and convolution.fused

    def _arguments(self, node: fx.Node) -> list[Any]:
        return list(fx.map_arg(node.args, self.values.__getitem__))


class _Steps:
    """The lifetimes of a graph's tensors, counted in its nodes."""

    def __init__(self, gm: fx.GraphModule, run: _Run, given: Collection[int]) -> None:
        self.run = run
        nodes = list(gm.graph.nodes)
        self.sizes: dict[int, int] = {}
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        returned: set[int] = set()
        for number, node in enumerate(nodes):
            if node.op == "output":
                values = [run.values[n] for n in node.all_input_nodes]
                returned.update(key for key in _storages(values) if key not in given)
            elif node.op not in ("placeholder", "get_attr"):
                for key, size in _storages([run.values[node]]).items():
                    if key not in given:
                        self.sizes[key] = size
                        self.first.setdefault(key, number)
                        self.last[key] = number
            for read in node.all_input_nodes:
                for key in _storages([run.values[read]]):
                    if key in self.last:
                        self.last[key] = number
        self.returned = returned
        self.taken = {number: self._taken(node) for number, node in enumerate(nodes)}

    def _taken(self, node: fx.Node) -> int:
        """What a node takes while it runs, beside its results."""
        inner = self.run.inner.get(node)
        if inner is None:
            return self.run.temporary.get(node, 0)
        given = {key for n in inner.gm.graph.nodes if n.op == "placeholder"
                 for key in _storages([inner.values[n]])}  # fmt: skip
        return _Steps(inner.gm, inner, given).arena()

    def arena(self) -> int:
        """Bytes of the one allocation that holds what the graph makes and does not return."""
        from sf_compile.cuda.arena import Lifetime, plan

        lifetimes = [
            Lifetime(size, self.first[key], self.last[key])
            for key, size in self.sizes.items()
            if key not in self.returned and size
        ]
        lifetimes += [Lifetime(size, number, number) for number, size in self.taken.items() if size]
        return plan(lifetimes).bytes

    def memory(self) -> Memory:
        """The output and the activations of a call."""
        most = 0
        inner = [key for key in self.sizes if key not in self.returned]
        for number, taken in self.taken.items():
            live = sum(self.sizes[key] for key in inner if self.first[key] <= number <= self.last[key])
            most = max(most, live + taken)
        output = sum(self.sizes[key] for key in self.returned if key in self.sizes)
        return Memory(0, output, most, 0, 0, self.run.exact)


def _storages(values: Iterable[Any]) -> dict[int, int]:
    """The storages behind tensors, those within tuples and lists too: identity to bytes."""
    found: dict[int, int] = {}
    for value in values:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage._cdata] = int(storage.nbytes())
        elif isinstance(value, tuple | list):
            found.update(_storages(value))
    return found


def _bytes(x: Tensor) -> int:
    return int(x.untyped_storage().nbytes())
