"""A GPU made of Python: kernels that work on the memory of CPU tensors, launched as real ones are.

``StandInGpu`` answers as the driver does, through cuda-bindings and through ctypes, and does the work.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import struct
import threading
from types import SimpleNamespace

import torch
from torch import Tensor, fx, nn

from sf_compile.cuda import kernel_graph
from sf_compile.cuda.compiler import KernelKey
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import pointer
from sf_compile.cuda.packing import packed
from sf_compile.cuda.recorder import observing
from sf_compile.cuda.tensor_maps import TensorMap
from sf_compile.cuda.workspace import zeroed

FUNCTION = 77
SIGNATURE = "TPPPPqf"


class Code(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_LAUNCH_FAILED = 719


def stand_in_map(address: int) -> TensorMap:
    """A tensor map that is its address, 16 times over."""
    return TensorMap.of(address, struct.pack("16Q", *[address] * 16), stand_in_map)


def floats(address: int, count: int):
    return (ctypes.c_float * count).from_address(address)


class GraphNode:
    """A kernel in a graph, with the values that its arguments had when it was told of them."""

    def __init__(self, parameters: kernel_graph.KernelNode, arguments) -> None:
        self.config = tuple(parameters.grid), tuple(parameters.block), parameters.shared_bytes
        self.function = parameters.function
        self.arguments = arguments
        self.attributes: list[tuple[int, int]] = []
        self.after: list[int] = []


class StandInGpu:
    """Counts its launches by who asked for them; ``fail`` makes launches of graphs fail.

    Graphs are launched with the arguments that their nodes were told last, node by node in the order of their
    edges; ``updated`` counts what they were told, and ``reject`` has them refuse it.
    """

    CUresult = Code

    class CUfunction_attribute:
        CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = "static"

    class CUlaunchAttributeID:
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6

    def __init__(self) -> None:
        self.launched = self.replayed = self.updated = 0
        self.configs: list[tuple] = []
        self.contexts: list[int] = []
        self.stream = 5
        self.fail = self.reject = False
        self.lock = threading.Lock()
        self.graphs: dict[int, list[int]] = {}
        self.executables: dict[int, list[int]] = {}
        self.nodes: dict[int, GraphNode] = {}
        self._handles = itertools.count(1000)
        self.driver = SimpleNamespace(**{
            name: ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(getattr(self, name.removesuffix("_v2")))
            for name, arguments in kernel_graph._ARGUMENTS.items()
        })

    def cuFuncGetAttribute(self, attribute, function):
        return 0, 0

    def cuCtxSetCurrent(self, context):
        self.contexts.append(threading.get_ident())
        return (0,)

    def cuGetErrorString(self, code):
        assert isinstance(code, Code)
        return 0, b"what the driver says"

    def CUlaunchAttribute(self):
        return SimpleNamespace(value=SimpleNamespace())

    def CUlaunchConfig(self):
        return SimpleNamespace()

    def cuLaunchKernelEx(self, config, function, address, extra):
        return self.cuLaunchKernel(function, 0, 0, 0, 0, 0, 0, 0, 0, address, extra)

    def cuLaunchKernel(self, function, x, y, z, block, by, bz, shared, stream, address, extra):
        self.launched += 1
        self._work(*self._arguments(address))
        return (0,)

    def cuLaunchCooperativeKernel(self, *arguments):
        return self.cuLaunchKernel(*arguments, 0)

    def _made(self, place: int) -> int:
        handle = ctypes.c_void_p.from_address(place).value = next(self._handles)
        return handle

    def cuThreadExchangeStreamCaptureMode(self, mode):
        return 0

    def cuGraphCreate(self, graph, flags):
        self.graphs[self._made(graph)] = []
        return 0

    def cuGraphAddKernelNode(self, node, graph, after, count, parameters):
        found = kernel_graph.KernelNode.from_address(parameters)
        handle = self._made(node)
        self.nodes[handle] = made = GraphNode(found, self._arguments(found.arguments))
        made.after += [ctypes.c_void_p.from_address(after + 8 * i).value for i in range(count)]
        self.graphs[graph].append(handle)
        return 0

    def cuGraphKernelNodeSetAttribute(self, node, attribute, value):
        self.nodes[node].attributes.append((attribute, ctypes.c_int.from_address(value).value))
        return 0

    def cuGraphAddDependencies(self, graph, before, after, edges, count):
        assert count == 1
        edge = kernel_graph.Edge.from_address(edges)
        assert (edge.from_port, edge.to_port, edge.kind, bytes(edge.reserved)) == (1, 0, 1, bytes(5))
        first, second = (ctypes.c_void_p.from_address(at).value for at in (before, after))
        assert {first, second} <= set(self.graphs[graph])
        self.nodes[second].after.append(first)
        self.nodes[second].attributes.append((6, 1))  # as a launch on a stream would be told
        return 0

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):
        order = self.graphs[graph]
        for before, node in itertools.pairwise([None, *order]):
            assert self.nodes[node].after == ([] if before is None else [before]), "they are a chain"
        self.executables[self._made(executable)] = order
        return 0

    def cuGraphExecKernelNodeSetParams(self, executable, node, parameters):
        assert node in self.executables[executable]
        if self.reject:
            return Code.CUDA_ERROR_LAUNCH_FAILED
        self.updated += 1
        found = kernel_graph.KernelNode.from_address(parameters)
        self.nodes[node].arguments = self._arguments(found.arguments)
        return 0

    def cuGraphLaunch(self, executable, stream):
        if self.fail:
            return Code.CUDA_ERROR_LAUNCH_FAILED
        for handle in self.executables[executable]:
            node = self.nodes[handle]
            with self.lock:
                self.replayed += 1
                self.configs.append((*node.config, stream, node.attributes, node.function))
            self._work(*node.arguments)
        return 0

    def cuGraphExecDestroy(self, executable):
        del self.executables[executable]
        return 0

    def cuGraphDestroy(self, graph):
        for node in self.graphs.pop(graph):
            del self.nodes[node]
        return 0

    def _arguments(self, address: int) -> tuple:
        """The values of a kernel's arguments: the address in its tensor map, and the others as they are."""
        at = (ctypes.c_void_p * len(SIGNATURE)).from_address(address)
        maps = struct.unpack("16Q", ctypes.string_at(at[0], 128))
        assert len(set(maps)) == 1
        addresses = (ctypes.c_uint64.from_address(at[i]).value for i in range(1, 5))
        count, scale = ctypes.c_int64.from_address(at[5]).value, ctypes.c_float.from_address(at[6]).value
        return maps[0], *addresses, count, scale

    def _work(self, target, x, residual, weight, meeting, count, scale) -> None:
        """out = scale x + residual + weight; the address of ``out`` comes in a tensor map."""
        out = floats(target, count)
        if meeting:
            assert not any(ctypes.string_at(meeting, 64)), "a workspace is zero between launches"
        for i in range(count):
            value = scale * floats(x, count)[i]
            value += floats(residual, count)[i] if residual else 0
            out[i] = value + (floats(weight, count)[i] if weight else 0)


KERNELS: list[Kernel] = []


def step(
    x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None, scale: float = 2.0,
    meets: bool = False,
) -> Tensor:  # fmt: skip
    """scale (scale x) + residual + 3 weight, by two launches: what a fused op's host side does."""
    between, out = torch.empty_like(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weights = None if weight is None else packed(weight, "stand-in", lambda w: w * 3).weight
    meeting = zeroed(x.device, "stand-in", 64) if meets else 0
    for target, source, add, last in ((between, x, None, False), (out, between, residual, True)):
        KERNELS[0].launch(
            (2, 1, 1), 32, 16,
            (stand_in_map(target.data_ptr()), source.data_ptr(), pointer(add),
             pointer(weights) if last else 0, meeting, x.numel(), scale),
        )  # fmt: skip
    return out


def expected(x, weight=None, residual=None, scale=2.0):
    out = scale * (scale * x)
    out = out if residual is None else out + residual
    return out if weight is None else out + weight.detach() * 3


def whole(*shape) -> Tensor:
    """Small whole numbers, with which any order of the sums gives the same bits."""
    return torch.randint(-8, 8, *(shape if isinstance(shape[0], tuple) else (shape,))).float()


def install(monkeypatch) -> StandInGpu:
    """The stand-in where CUDA would be, and one kernel on it."""
    gpu = StandInGpu()
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: gpu.stream, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kernel_graph, "driver", lambda: gpu.driver)
    kernel = Kernel(KernelKey("step.cu", (), "sm_90a"), "step", SIGNATURE, None, gpu, FUNCTION, "context")
    monkeypatch.setattr(f"{__name__}.KERNELS", [kernel])
    assert observing.recorder is None
    return gpu


def graph_of(build, count: int) -> fx.GraphModule:
    """A graph of ``count`` inputs that returns the tuple ``build(graph.call_function, *inputs)``."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(count)]
    graph.output(tuple(build(lambda f, *a: graph.call_function(f, a), *inputs)))
    return fx.GraphModule(nn.Module(), graph)
