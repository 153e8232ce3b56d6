"""A chain of kernels as one CUDA graph, whose launch is one call of the driver.

The graph is built node by node, not captured: so nobody's capture can get in its way, and each node is known
when its arguments change. The driver is called through ctypes with structures that are kept, which takes a
fraction of the host time of cuda-bindings' checked and converted calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from ctypes import byref, c_int, c_size_t, c_uint, c_uint8, c_ulonglong, c_void_p
from typing import Any, NamedTuple

from sf_compile.cuda.launcher import Kernel

_COOPERATIVE = 2  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_PROGRAMMATIC = 1  # CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC and CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC


class KernelNode(ctypes.Structure):
    """``CUDA_KERNEL_NODE_PARAMS_v2`` of cuda.h."""

    _fields_ = (
        ("function", c_void_p), ("grid", c_uint * 3), ("block", c_uint * 3), ("shared_bytes", c_uint),
        ("arguments", c_void_p), ("extra", c_void_p), ("kernel", c_void_p), ("context", c_void_p),
    )  # fmt: skip


class Edge(ctypes.Structure):
    """``CUgraphEdgeData`` of cuda.h."""

    _fields_ = (
        ("from_port", c_uint8), ("to_port", c_uint8), ("kind", c_uint8), ("reserved", c_uint8 * 5),
    )  # fmt: skip


class AttributeValue(ctypes.Union):
    """``CUlaunchAttributeValue`` of cuda.h: 64 bytes, of which the first four say how a kernel cooperates."""

    _fields_ = (("padding", c_uint * 16), ("cooperative", c_int))


class Node(NamedTuple):
    """One launch: ``arguments`` is the address of the array of pointers to them (``ArgumentBlock``)."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    arguments: int


_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuGraphCreate": (c_void_p, c_uint),
    "cuGraphAddKernelNode_v2": (c_void_p, c_void_p, c_void_p, c_size_t, c_void_p),
    "cuGraphKernelNodeSetAttribute": (c_void_p, c_int, c_void_p),
    "cuGraphAddDependencies_v2": (c_void_p, c_void_p, c_void_p, c_void_p, c_size_t),
    "cuGraphInstantiateWithFlags": (c_void_p, c_void_p, c_ulonglong),
    "cuGraphExecKernelNodeSetParams_v2": (c_void_p, c_void_p, c_void_p),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuThreadExchangeStreamCaptureMode": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}


@functools.cache
def driver() -> Any:
    """The driver's library, the functions used here declared; each returns its error code.

    Raises:
        AttributeError: it lacks one; see ``refusal``.
    """
    library = ctypes.CDLL("libcuda.so.1")
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    return library


def refusal() -> str | None:
    """Why there can be no ``KernelGraph`` here; None where there can."""
    try:
        driver()
    except AttributeError as error:
        return f"the driver is older than CUDA 12.3 ({error})"
    return None


@contextlib.contextmanager
def _beside_captures(library: Any) -> Iterator[None]:
    """What is done inside does not belong to a capture that is in progress, and may allocate and free."""
    mode = c_int(_RELAXED)
    library.cuThreadExchangeStreamCaptureMode(byref(mode))
    try:
        yield
    finally:
        library.cuThreadExchangeStreamCaptureMode(byref(mode))


def _destroyed(library: Any, name: str, handle: c_void_p) -> None:
    # Nobody could do anything about an error here: at the end of a process the driver may be gone already.
    with _beside_captures(library):
        getattr(library, name)(handle)


class KernelGraph:
    """Kernels that follow each other as their modes say (``loader.load``), to be launched on one stream.

    The calling thread has entered the kernels' context, and alone uses this. What the nodes' argument arrays
    point to is read when a node is made and by ``update``, and must stay where it is.

    Raises:
        KernelLaunchError: the driver rejects a kernel's launch, or the graph.
    """

    def __init__(self, nodes: Sequence[Node], stream: int) -> None:
        self._nodes = tuple(nodes)
        self._driver = driver()
        with _beside_captures(self._driver):
            self._build(stream)

    def _build(self, stream: int) -> None:
        graph, executable = c_void_p(), c_void_p()
        self._check("cuGraphCreate", self._driver.cuGraphCreate(byref(graph), 0))
        self._destroy_with_this("cuGraphDestroy", graph)
        handles: list[c_void_p] = []
        parameters = [
            KernelNode(
                int(node.kernel.function), node.grid, (node.block, 1, 1), node.shared_bytes, node.arguments
            )
            for node in self._nodes
        ]
        for node, one in zip(self._nodes, parameters, strict=True):
            handles.append(self._added(graph, handles, node, one))
        code = self._driver.cuGraphInstantiateWithFlags(byref(executable), graph, 0)
        self._check("cuGraphInstantiate", code)
        # A launch that still runs then is let finish: the driver frees the graph behind it.
        self._destroy_with_this("cuGraphExecDestroy", executable)
        update = self._driver.cuGraphExecKernelNodeSetParams_v2
        self._updates: list[Callable[[], int]] = [
            functools.partial(update, executable, handle, byref(one))
            for handle, one in zip(handles, parameters, strict=True)
        ]
        self._launch: Callable[[], int] = functools.partial(
            self._driver.cuGraphLaunch, executable, c_void_p(stream)
        )

    def _destroy_with_this(self, name: str, handle: c_void_p) -> None:
        weakref.finalize(self, _destroyed, self._driver, name, handle).atexit = False

    def _added(
        self, graph: c_void_p, before: Sequence[c_void_p], node: Node, parameters: KernelNode
    ) -> c_void_p:
        """The node's handle; it follows the last of ``before``."""
        added, overlaps = c_void_p(), node.kernel.mode == "overlapping"
        previous = (c_void_p * 1)(before[-1]) if before else None
        at_once = 0 if overlaps or previous is None else 1
        code = self._driver.cuGraphAddKernelNode_v2(byref(added), graph, previous, at_once, byref(parameters))
        self._check_node(node, code)
        if node.kernel.mode == "cooperative":
            value = AttributeValue(cooperative=1)
            set_attribute = self._driver.cuGraphKernelNodeSetAttribute
            self._check_node(node, set_attribute(added, _COOPERATIVE, byref(value)))
        if overlaps and previous is not None:
            edge, to = Edge(_PROGRAMMATIC, 0, _PROGRAMMATIC), (c_void_p * 1)(added)
            code = self._driver.cuGraphAddDependencies_v2(graph, previous, to, byref(edge), 1)
            self._check_node(node, code)
        return added

    def update(self, number: int) -> None:
        """Take the arguments of a node anew, for the launches that come.

        Raises:
            KernelLaunchError: the driver rejects them.
        """
        code = self._updates[number]()
        if code:
            self._check_node(self._nodes[number], code)

    def launch(self) -> None:
        """Launch all of it, behind what the stream has.

        Raises:
            KernelLaunchError: the driver rejects it, or reports an error of an earlier kernel.
        """
        code = self._launch()
        if code:
            self._check("cuGraphLaunch", code)

    def _check_node(self, node: Node, code: int) -> None:
        if code:
            raise node.kernel.failure(node.grid, node.block, node.shared_bytes, code)

    def _check(self, step: str, code: int) -> None:
        if code:
            kernels = ", ".join(dict.fromkeys(node.kernel.entry for node in self._nodes))
            what = f"{step} of {len(self._nodes)} launches ({kernels}) on cuda:"
            first = self._nodes[0].kernel
            raise first.driver_error(f"{what}{first.device_index}", code)
