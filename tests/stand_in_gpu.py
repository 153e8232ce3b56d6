"""A GPU made of Python: kernels that work on the memory of CPU tensors, launched as real ones are.

``StandInGpu`` answers as the driver does, through cuda-bindings and through ctypes, and does the work.
"""

from __future__ import annotations

import ctypes
import enum
import struct
import threading
from types import SimpleNamespace

import torch
from torch import Tensor, fx, nn

from sf_compile.cuda import replay
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


class StandInGpu:
    """Counts its launches by who asked for them; ``fail`` makes the next replayed one fail."""

    CUresult = Code

    class CUfunction_attribute:
        CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = "static"

    class CUlaunchAttributeID:
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6

    def __init__(self) -> None:
        self.launched = self.replayed = 0
        self.configs: list[tuple] = []
        self.contexts: list[int] = []
        self.stream = 5
        self.fail = False
        self.lock = threading.Lock()
        self.submit = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(self._submit)

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
        self._work(address)
        return (0,)

    def cuLaunchCooperativeKernel(self, *arguments):
        return self.cuLaunchKernel(*arguments, 0)

    def _submit(self, config, function, address, extra):
        found = replay.LaunchConfig.from_address(config)
        attributes = [(a.identifier, a.value[0]) for a in found.attributes[: found.attribute_count]]
        with self.lock:
            self.replayed += 1
            sizes = tuple(found.grid), tuple(found.block), found.shared_bytes
            self.configs.append((*sizes, found.stream, attributes, function))
        if self.fail:
            return Code.CUDA_ERROR_LAUNCH_FAILED
        self._work(address)
        return 0

    def _work(self, address: int) -> None:
        """out = scale x + residual + weight; the address of ``out`` comes in a tensor map."""
        at = (ctypes.c_void_p * len(SIGNATURE)).from_address(address)
        maps = struct.unpack("16Q", ctypes.string_at(at[0], 128))
        assert len(set(maps)) == 1
        x, residual, weight, meeting = (ctypes.c_uint64.from_address(at[i]).value for i in range(1, 5))
        count, scale = ctypes.c_int64.from_address(at[5]).value, ctypes.c_float.from_address(at[6]).value
        out = floats(maps[0], count)
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
    monkeypatch.setattr(replay, "submit", lambda: gpu.submit)
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
