"""Argument packing and error reports with a stand-in driver, and real launches on a GPU."""

import ctypes
import enum
import struct
import threading
from types import SimpleNamespace

import pytest
import torch

from sf_compile.cuda import cache, compiler, loader
from sf_compile.cuda.argument_block import ArgumentBlock, argument_format, parameter_fields
from sf_compile.cuda.compiler import KernelKey, KernelUnavailable
from sf_compile.cuda.driver_calls import KernelLaunchError
from sf_compile.cuda.launcher import Kernel

KEY = KernelKey("affine.cu", (("BLOCK", 256),), "sm_90a")
SOURCE = """
extern "C" __global__ void affine(float* y, int stride, const float* x, long long n, float a, double b) {
    long long i = blockIdx.x * (long long)BLOCK + threadIdx.x;
    if (i < n) y[i * stride] = a * x[i] + (float)b;
}
extern "C" __global__ void reverse(float* x, int n) {
    extern __shared__ float tile[];
    __shared__ int length[1];
    if (threadIdx.x == 0) length[0] = n;
    __syncthreads();
    for (int i = threadIdx.x; i < length[0]; i += BLOCK) tile[n - 1 - i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < length[0]; i += BLOCK) x[i] = tile[i];
}
"""

# y = x + 1: `slow` lets its successor start at once, and takes some 10 ms; both wait for what is before them.
PAIR = """
extern "C" __global__ void slow(float* y, const float* x, int n) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    long long begin = clock64();
    while (clock64() - begin < 20000000) {}
    if (threadIdx.x < n) y[threadIdx.x] = x[threadIdx.x] + 1.f;
}
extern "C" __global__ void after(float* y, const float* x, int n) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (blockIdx.x == 0 && threadIdx.x < n) y[threadIdx.x] = x[threadIdx.x] + 1.f;
}
"""


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """A folder of kernel sources in the place of the real one, and nothing compiled or loaded yet."""
    (tmp_path / "affine.cu").write_text(SOURCE)
    monkeypatch.setattr(compiler, "source_directory", lambda: tmp_path)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_memo", {})
    monkeypatch.setattr(loader, "_loaded", {})
    return tmp_path


@pytest.mark.parametrize(
    ("signature", "arguments"),
    [("PqifdP", (2**64 - 8, -(2**40), -7, 0.5, 1 / 3, 0)), ("iPidq", (1, 4096, 2, 2.5, 3)), ("f", (1.5,)),
     ("", ())],
)
def test_pointer_array_reaches_every_argument(signature, arguments):
    block = ArgumentBlock(signature)
    struct.Struct("@" + signature).pack_into(block.values, 0, *arguments)
    types = {"P": ctypes.c_uint64, "q": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float,
             "d": ctypes.c_double}
    pointers = (ctypes.c_void_p * len(signature)).from_address(block.address)
    found = tuple(types[c].from_address(p).value for c, p in zip(signature, pointers, strict=True))
    assert found == arguments
    assert all(p % ctypes.sizeof(types[c]) == 0 for c, p in zip(signature, pointers, strict=True))


def test_tensor_maps_come_first_and_take_128_bytes_each():
    fields = [(0, 128), (128, 128), (256, 512), (768, 8), (776, 4), (784, 8)]
    assert parameter_fields("TTFPfq") == fields
    block = ArgumentBlock("TFPi")
    maps = bytes(range(128)), bytes(range(256)) * 2
    struct.Struct(argument_format("TFPi")).pack_into(block.values, 0, *maps, 4096, -7)
    pointers = (ctypes.c_void_p * 4).from_address(block.address)
    assert tuple(ctypes.string_at(p, n) for p, n in zip(pointers, (128, 512), strict=False)) == maps
    assert ctypes.c_uint64.from_address(pointers[2]).value == 4096
    assert ctypes.c_int32.from_address(pointers[3]).value == -7
    for signature in ("PT", "TiT", "TPF", "iF"):
        with pytest.raises(ValueError, match="before everything else"):
            ArgumentBlock(signature)


def test_unknown_signature_letter():
    with pytest.raises(ValueError, match="letter 'x'"):
        ArgumentBlock("Pxi")


class Code(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class StandInDriver:
    """The driver calls that a Kernel makes, recorded; ``answers`` are the codes of the launches to come."""

    CUresult = Code
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES="static",
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="dynamic",
    )
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="optin")

    def __init__(self):
        self.calls = []
        self.answers = []

    def cuFuncGetAttribute(self, attribute, function):
        return (0, 1024)

    def cuDeviceGet(self, index):
        return (0, index)

    def cuDeviceGetAttribute(self, attribute, device):
        return (0, 200_000)

    def cuFuncSetAttribute(self, function, attribute, value):
        self.calls.append((attribute, value))
        return (0,)

    def cuCtxSetCurrent(self, context):
        self.calls.append(("context", context))
        return (0,)

    def cuGetErrorString(self, result):
        return (0, b"what the driver says")

    def cuLaunchKernel(self, *launch):
        self.calls.append(("launch", launch[:9]))
        return (self.answers.pop(0) if self.answers else Code.CUDA_SUCCESS,)


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    return StandInDriver()


def kernel_on(driver: StandInDriver, index: int = 0) -> Kernel:
    return Kernel(KEY, "affine", "Pi", index, driver, "function", "context")


def test_launch_goes_to_the_current_stream_and_device(driver, monkeypatch):
    switched = []

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            switched.append(self.index)

        def __exit__(self, *error):
            switched.append("back")

    monkeypatch.setattr(torch.cuda, "device", Guard)
    kernel_on(driver).launch((3, 2, 1), 256, 0, (64, 5))
    assert driver.calls[1:] == [("launch", ("function", 3, 2, 1, 256, 1, 1, 0, 1000))]
    assert switched == []
    kernel_on(driver, 1).launch((3, 2, 1), 256, 0, (64, 5))
    assert driver.calls[-1] == ("launch", ("function", 3, 2, 1, 256, 1, 1, 0, 1001))
    assert switched == [1, "back"]


def test_every_thread_gets_the_context_once(driver):
    kernel = kernel_on(driver)

    def work():
        for _ in range(2):
            kernel.launch((1, 1, 1), 32, 0, (0, 0))

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [call[0] for call in driver.calls] == ["context", "launch", "launch"] * 2


def test_modes_of_launching(driver):
    def submitted(*launch):
        driver.calls.append(("launch", launch))
        return (driver.answers.pop(0) if driver.answers else Code.CUDA_SUCCESS,)

    def attribute():
        return SimpleNamespace(value=SimpleNamespace())

    driver.cuLaunchCooperativeKernel = driver.cuLaunchKernelEx = submitted
    driver.CUlaunchAttributeID = SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="serialization"
    )
    driver.CUlaunchAttribute, driver.CUlaunchConfig = attribute, SimpleNamespace
    Kernel(KEY, "affine", "Pi", 0, driver, "function", "context", "cooperative").launch(
        (3, 2, 1), 256, 0, (64, 5)
    )
    name, launch = driver.calls[-1]
    assert launch[:9] == ("function", 3, 2, 1, 256, 1, 1, 0, 1000) and len(launch) == 10  # no `extra`
    kernel = Kernel(KEY, "affine", "Pi", 0, driver, "function", "context", "overlapping")
    kernel.launch((3, 2, 1), 256, 64, (64, 5))
    name, (config, function, address, extra) = driver.calls[-1]
    assert (name, function, extra) == ("launch", "function", 0)
    assert address == kernel._threads.arguments.address
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (3, 2, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (256, 1, 1)
    assert (config.sharedMemBytes, config.hStream, config.numAttrs) == (64, 1000, 1)
    assert config.attrs[0].id == "serialization"
    assert config.attrs[0].value.programmaticStreamSerializationAllowed == 1
    driver.answers = [Code.CUDA_ERROR_INVALID_VALUE]
    with pytest.raises(KernelLaunchError, match=r"grid 3x2x1, block 256, 64 bytes"):
        kernel.launch((3, 2, 1), 256, 64, (64, 5))


@pytest.mark.parametrize("code", [Code.CUDA_ERROR_INVALID_VALUE, Code.CUDA_ERROR_ILLEGAL_ADDRESS])
def test_driver_error_names_the_kernel_and_the_launch(driver, code):
    driver.answers = [code]
    with pytest.raises(KernelLaunchError) as raised:
        kernel_on(driver).launch((3, 2, 1), 4096, 16, (0, 0))
    text = str(raised.value)
    for part in (code.name, "what the driver says", "affine.cu[BLOCK=256]@sm_90a", "cuda:0", "grid 3x2x1",
                 "block 4096", "16 bytes"):
        assert part in text
    assert ("CUDA_LAUNCH_BLOCKING" in text) == (code is Code.CUDA_ERROR_ILLEGAL_ADDRESS)


@pytest.mark.parametrize("arguments", [(0,), (0, 0, 0), (0, "5"), (0, 2**31), (0, 1.5)])
def test_arguments_that_do_not_fit_the_signature(driver, arguments):
    with pytest.raises(TypeError, match=r"affine .*takes the arguments 'Pi'"):
        kernel_on(driver).launch((1, 1, 1), 32, 0, arguments)
    assert "launch" not in [call[0] for call in driver.calls]


def test_shared_memory_limit_is_raised_once(driver):
    kernel = kernel_on(driver)
    kernel.launch((1, 1, 1), 32, 48 * 1024 - 1024, (0, 0))
    assert ("dynamic", 200_000 - 1024) not in driver.calls
    for _ in range(2):
        kernel.launch((1, 1, 1), 32, 48 * 1024, (0, 0))
    assert driver.calls.count(("dynamic", 200_000 - 1024)) == 1
    with pytest.raises(ValueError, match=r"200000 bytes .* allows 198976 \(200000 less 1024 static\)"):
        kernel.launch((1, 1, 1), 32, 200_000, (0, 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_load_without_a_gpu(csrc):
    with pytest.raises(KernelUnavailable, match="no NVIDIA GPU"):
        loader.load("affine.cu", "affine", {"BLOCK": 256}, 0, "PiPqfd")


def test_load_rejects_other_devices_and_bad_signatures(csrc):
    with pytest.raises(ValueError, match="runs on a CUDA device, not on cpu"):
        loader.load("affine.cu", "affine", {"BLOCK": 256}, torch.device("cpu"), "PiPqfd")
    with pytest.raises(ValueError, match="letter 's'"):
        loader.load("affine.cu", "affine", {"BLOCK": 256}, 0, "Ps")


def load_affine(device: torch.device | int = 0, **constants: int) -> Kernel:
    return loader.load("affine.cu", "affine", {"BLOCK": 256, **constants}, device, "PiPqfd")


def launch_affine(kernel: Kernel, y: torch.Tensor, x: torch.Tensor, a: float, b: float) -> None:
    blocks = (x.numel() + 255) // 256
    kernel.launch((blocks, 1, 1), 256, 0, (y.data_ptr(), 1, x.data_ptr(), x.numel(), a, b))


@pytest.mark.gpu
def test_every_signature_letter_reaches_the_kernel(csrc):
    x = torch.randn(1001, device="cuda")
    y = torch.full((2002,), 9.0, device="cuda")
    kernel = load_affine()
    kernel.launch((4, 1, 1), 256, 0, (y.data_ptr(), 2, x.data_ptr(), 1001, 3.0, 0.25))
    torch.testing.assert_close(y[::2], 3.0 * x + 0.25)
    assert (y[1::2] == 9.0).all()


@pytest.mark.gpu
def test_load_is_a_lookup_after_the_first_call(csrc, monkeypatch):
    first = load_affine()
    assert load_affine(torch.device("cuda", 0)) is first
    assert load_affine(torch.device("cuda")) is first
    two_orders = [{"BLOCK": 256, "UNUSED": 1}, {"UNUSED": 1, "BLOCK": 256}]
    a, b = (loader.load("affine.cu", "affine", order, 0, "PiPqfd") for order in two_orders)
    assert a is b and a is not first
    monkeypatch.setattr(loader, "_load", None)
    assert load_affine() is first


@pytest.mark.gpu
def test_reload_takes_the_cubin_from_the_disk_and_changes_nothing(csrc, monkeypatch):
    first = load_affine()
    monkeypatch.setattr(compiler, "_run_nvrtc", None)
    again = loader.reload(first)
    assert again is not first and load_affine() is first
    assert 0 < again.load_seconds < first.load_seconds
    x, y = torch.randn(300, device="cuda"), torch.empty(300, device="cuda")
    launch_affine(again, y, x, 2.0, 1.0)
    torch.testing.assert_close(y, 2 * x + 1)


@pytest.mark.gpu
def test_unknown_entry_names_the_kernel(csrc):
    with pytest.raises(KernelLaunchError, match=r"absent \(affine\.cu\[BLOCK=256\].*CUDA_ERROR_NOT_FOUND"):
        loader.load("affine.cu", "absent", {"BLOCK": 256}, 0, "P")


@pytest.mark.gpu
def test_runs_on_the_current_stream(csrc, monkeypatch):
    kernel = load_affine()
    submit = kernel._submit
    used = []

    def recorded(*launch):
        used.append(launch[8])
        return submit(*launch)

    monkeypatch.setattr(kernel, "_submit", recorded)
    x = torch.ones(1 << 20, device="cuda")
    y, z = torch.zeros_like(x), torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.add_(1.0)
        launch_affine(kernel, y, x, 2.0, 1.0)
    stream.synchronize()
    launch_affine(kernel, z, y, 2.0, 1.0)
    assert used == [stream.cuda_stream, torch.cuda.default_stream().cuda_stream]
    assert (y == 5).all().item(), "the launch ran before the work that its stream held"
    assert (z == 11).all().item()


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_overlapping_kernel_waits_for_its_predecessor(csrc, captured):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    (csrc / "pair.cu").write_text(PAIR)
    first = loader.load("pair.cu", "slow", {}, 0, "PPi", "overlapping")
    second = loader.load("pair.cu", "after", {}, 0, "PPi", "overlapping")
    x, y, z = (torch.zeros(1000, device="cuda") for _ in range(3))

    def pair():
        first.launch((1, 1, 1), 1000, 0, (x.data_ptr(), z.data_ptr(), 1000))
        second.launch((8, 1, 1), 1000, 0, (y.data_ptr(), x.data_ptr(), 1000))
        first.launch((1, 1, 1), 1000, 0, (z.data_ptr(), y.data_ptr(), 1000))
        second.launch((8, 1, 1), 1000, 0, (y.data_ptr(), z.data_ptr(), 1000))

    pair()
    torch.cuda.synchronize()
    assert [v[0].item() for v in (x, y, z)] == [1, 4, 3] and all((v == v[0]).all() for v in (x, y, z))
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            pair()
        graph.replay()
    else:
        pair()
    torch.cuda.synchronize()
    assert [v[0].item() for v in (x, y, z)] == [4, 7, 6] and all((v == v[0]).all() for v in (x, y, z))


@pytest.mark.gpu
@pytest.mark.parametrize("loaded_before", [True, False])
def test_captured_into_a_cuda_graph(csrc, loaded_before):
    x = torch.ones(1000, device="cuda")
    y = torch.zeros_like(x)
    if loaded_before:
        load_affine()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_affine(load_affine(), y, x, 2.0, 1.0)
        launch_affine(load_affine(), y, y, 2.0, 1.0)
    assert (y == 0).all().item(), "capturing runs nothing"
    x.fill_(3.0)
    for _ in range(2):
        y.zero_()
        graph.replay()
        assert (y == 15).all().item()


@pytest.mark.gpu
def test_wrong_block_size_names_the_kernel_and_harms_nothing(csrc):
    kernel = load_affine()
    x, y = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    arguments = (y.data_ptr(), 1, x.data_ptr(), 1000, 1.0, 0.0)
    with pytest.raises(KernelLaunchError, match=r"affine \(affine\.cu.*block 4096.*CUDA_ERROR_INVALID_VALUE"):
        kernel.launch((1, 1, 1), 4096, 0, arguments)
    with pytest.raises(KernelLaunchError, match=r"grid 0x1x1.*CUDA_ERROR_INVALID_VALUE"):
        kernel.launch((0, 1, 1), 256, 0, arguments)
    with pytest.raises(ValueError, match="grid -1x1x1"):
        kernel.launch((-1, 1, 1), 256, 0, arguments)
    launch_affine(kernel, y, x, 1.0, 0.0)
    assert torch.equal(x, y)


@pytest.mark.gpu
def test_more_shared_memory_than_the_default(csrc):
    kernel = loader.load("affine.cu", "reverse", {"BLOCK": 256}, 0, "Pi")
    for kilobytes in (48, 64, 96):  # 96 KB: every listed architecture allows 99 or more
        x = torch.arange(kilobytes * 256, dtype=torch.float32, device="cuda")
        expected = x.flip(0)
        kernel.launch((1, 1, 1), 256, 4 * x.numel(), (x.data_ptr(), x.numel()))
        assert torch.equal(x, expected)
    with pytest.raises(ValueError, match="choose a smaller tile"):
        kernel.launch((1, 1, 1), 256, 1 << 20, (0, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [True, False])
def test_two_threads_at_once_each_with_its_own_arguments(csrc, own_stream):
    kernel = load_affine()
    inputs = [torch.full((1000,), float(i + 1), device="cuda") for i in range(2)]
    outputs = [torch.zeros(200, 1000, device="cuda") for _ in inputs]
    streams = [torch.cuda.Stream() if own_stream else torch.cuda.default_stream() for _ in inputs]
    torch.cuda.synchronize()
    start = threading.Barrier(2)
    errors = []

    def work(i):
        try:
            with torch.cuda.stream(streams[i]):
                start.wait()
                for row in range(200):
                    launch_affine(kernel, outputs[i][row], inputs[i], float(row), float(i))
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert errors == []
    rows = torch.arange(200.0, device="cuda")[:, None]
    for i in range(2):
        assert torch.equal(outputs[i], (rows * (i + 1) + i).expand(200, 1000))


@pytest.mark.gpu
def test_thread_that_has_made_no_cuda_call(csrc):
    kernel = load_affine()
    x, y = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    arguments = (y.data_ptr(), 1, x.data_ptr(), 1000, 2.0, 1.0)
    errors = []

    def work():
        try:
            kernel.launch((4, 1, 1), 256, 0, arguments)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    torch.cuda.synchronize()
    assert (y == 3).all().item()


@pytest.mark.gpu
def test_device_that_is_not_the_current_one(csrc):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.ones(1000, device="cuda:1")
    y = torch.zeros_like(x)
    kernel = load_affine(x.device)
    launch_affine(kernel, y, x, 2.0, 1.0)
    assert torch.cuda.current_device() == 0
    assert (y == 3).all().item()
    assert kernel is not load_affine(0)
