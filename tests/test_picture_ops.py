"""Bytes to numbers and back: the ops on every device, and csrc/picture.cu itself, run on a CPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_kernel import EMULATION, guarded

from sf_compile import ops
from sf_compile.cuda import picture
from sf_compile.cuda.compiler import source_directory

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANGES = ((0.0, 255.0), (0.0, 1.0), (-1.0, 1.0), (-127.5, 127.5))
# (N, H, W) and the size it is extended to.
SIZES = [
    ((2, 5, 8), (5, 8)),  # vectors in and out
    ((1, 4, 8), (6, 9)),  # in alone
    ((2, 6, 7), (8, 8)),  # out alone
    ((1, 3, 5), (3, 5)),  # neither
    ((1, 30, 50), (32, 52)),
    ((1, 1, 1), (8, 8)),  # mirrored again and again
    ((1, 2, 3), (8, 8)),
    ((1, 33, 128), (33, 128)),  # several blocks
]


def pixels(n, height, width, device="cpu", channels=3):
    return torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8).to(device)


def extended(bytes_, size):
    _, height, width, _ = bytes_.shape
    pads = ((0, 0), (0, size[0] - height), (0, size[1] - width), (0, 0))
    return torch.from_numpy(np.pad(bytes_.cpu().numpy(), pads, mode="reflect"))


@functools.cache
def every_byte():
    return torch.arange(256, dtype=torch.uint8).repeat(3).view(3, 1, 256).permute(1, 2, 0)[None]


@functools.cache
def library(constants):
    folder = Path(tempfile.mkdtemp(prefix="styleforge-emulation-"))
    for path in EMULATION.iterdir():
        shutil.copy(path, folder)
    main = """
extern "C" const char* launch(int which, u32 grid, u32 threads, u32 bytes, const u64* values) {
  if (which == 0) return emulator::launch(picture_to_float, grid, threads, bytes, values, 1);
  return emulator::launch(picture_to_uint8, grid, threads, bytes, values, 1);
}
"""
    intrinsics = """#include "emulator.h"
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float a) { return (int)std::nearbyintf(a); }
"""
    (folder / "made.cu").write_text(intrinsics + (source_directory() / "picture.cu").read_text() + main)
    defines = [f"-D{name}={value}" for name, value in constants]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-x", "c++"]
    subprocess.run(["g++", *flags, *defines, "made.cu", "-o", "made.so"], cwd=folder, check=True)
    made = ctypes.CDLL(str(folder / "made.so"))
    made.launch.restype = ctypes.c_char_p
    return made


class Emulated:
    def __init__(self, entry, dtype, layout):
        self.library = library(tuple(picture.constants(dtype, layout).items()))
        self.entry = entry

    def launch(self, grid, block, shared_bytes, arguments):
        signature = picture._SIGNATURES[self.entry]
        assert len(signature) == len(arguments) and grid[1:] == (1, 1)
        formats = {"P": "Q", "q": "q", "i": "i4x", "f": "f4x"}
        packed = b"".join(
            struct.pack("<" + formats[letter], value)
            for letter, value in zip(signature, arguments, strict=True)
        )
        which = int(self.entry == "picture_to_uint8")
        values = ctypes.create_string_buffer(packed)
        failure = self.library.launch(which, grid[0], block, shared_bytes, values)
        assert failure is None, f"the emulated kernel: {failure.decode()}"


@pytest.fixture
def emulated(monkeypatch):
    """The host side of the kernels, with kernels that run on the CPU; (entry, layout) of each that ran."""
    if shutil.which("g++") is None:
        pytest.skip("running a kernel on the CPU needs g++")
    ran = []

    def kernel(index, entry, dtype, layout):
        ran.append((entry, layout))
        return Emulated(entry, dtype, layout)

    monkeypatch.setattr(picture, "_kernel", kernel)
    monkeypatch.setattr(picture, "usable_or_warn", lambda: True)
    return ran


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_bytes_become_numbers_of_the_extended_picture(shape, size, channels_last, device):
    x = pixels(*shape, device)
    for dtype in (*DTYPES, torch.float64):
        out = ops.picture_to_float(x, size, dtype, 0.0, 255.0, channels_last)
        assert out.dtype == dtype and out.shape == (shape[0], 3, *size)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert out.is_contiguous(memory_format=memory_format)
        assert torch.equal(out.cpu(), extended(x, size).permute(0, 3, 1, 2).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ends", RANGES)
def test_numbers_are_rounded_once_and_come_back(ends, device):
    low, high = ends
    x = every_byte().to(device)
    out = ops.picture_to_float(x, (1, 256), torch.float32, low, high)
    exact = x.cpu().permute(0, 3, 1, 2).double() * (high - low) / 255 + low
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-6, atol=3e-8 * (high - low))
    assert out.min() == low and out.max() == high
    for dtype in (torch.float32, torch.float16):
        numbers = ops.picture_to_float(x, (1, 256), dtype, low, high)
        back, broken = ops.picture_to_uint8(numbers, low, high)
        assert torch.equal(back, x) and broken.tolist() == [0]
    if (low, high) == (0.0, 1.0) and device == "cpu":  # as torchvision's ToTensor does it
        assert torch.equal(out, x.permute(0, 3, 1, 2).float().div(255))


def planes(x):
    return x


def dense_pixels(x):
    return x.contiguous(memory_format=torch.channels_last)


def cropped(x):
    return torch.nn.functional.pad(x, (0, 3, 0, 1))[:, :, : x.shape[2], : x.shape[3]]


def cropped_pixels(x):
    wide = torch.nn.functional.pad(x, (0, 4, 0, 1)).contiguous(memory_format=torch.channels_last)
    return wide[:, :, : x.shape[2], : x.shape[3]]


def shifted(x):
    return torch.nn.functional.pad(x, (1, 3))[:, :, :, 1 : 1 + x.shape[3]]


def turned(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


STRIDES = (planes, dense_pixels, cropped, cropped_pixels, shifted, turned)


def numbers(shape, dtype):
    n, height, width = shape
    x = torch.rand(n, 3, height, width) * 400 - 70
    x[:, :, ::2] = (x[:, :, ::2]).floor() + 0.5  # halves, to be rounded to even ones
    return x.to(dtype)


def rounded(x):
    return x.float().clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", STRIDES)
def test_numbers_are_clamped_and_rounded_half_to_even(strides, device):
    for dtype in (*DTYPES, torch.float64):
        for shape in ((2, 5, 8), (1, 6, 7), (1, 40, 36), (3, 1, 1)):
            x = numbers(shape, dtype)
            out, broken = ops.picture_to_uint8(strides(x.to(device)))
            assert out.is_contiguous() and torch.equal(out.cpu(), rounded(x))
            assert broken.dtype == torch.int32 and broken.tolist() == [0] * shape[0]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_is_told_by_picture(device):
    for dtype in DTYPES:
        x = torch.full((5, 3, 4, 6), 7.0, dtype=dtype, device=device)
        x[1, 2, 3, 5], x[3, 0, 0, 0], x[4, 1, 2, 1] = torch.nan, torch.inf, -torch.inf
        out, broken = ops.picture_to_uint8(x)
        assert broken.tolist() == [0, 1, 0, 1, 1]
        assert [out[1, 3, 5, 2], out[3, 0, 0, 0], out[4, 2, 1, 1]] == [0, 255, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_other_numbers_of_channels_and_empty_batches(device):
    for shape in ((2, 4, 6, 1), (1, 4, 8, 4), (0, 4, 4, 3)):
        x = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
        out = ops.picture_to_float(x, shape[1:3], torch.float32)
        assert torch.equal(out, x.permute(0, 3, 1, 2).float())
        assert torch.equal(ops.picture_to_uint8(out)[0], x)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_on_a_cpu_makes_the_same_numbers(emulated, dtype, channels_last):
    for (shape, size), ends in zip(SIZES, RANGES * 2, strict=True):
        x = guarded(pixels(*shape))
        out = picture.picture_to_float(x, size, dtype, *ends, channels_last)
        assert torch.equal(out, ops.picture_to_float(x, size, dtype, *ends, channels_last))
        assert out.stride() == ops.picture_to_float(x, size, dtype, *ends, channels_last).stride()
    unaligned = torch.cat([torch.zeros(1, dtype=torch.uint8), pixels(1, 2, 8).flatten()])[1:].view(1, 2, 8, 3)
    out = picture.picture_to_float(unaligned, (2, 8), dtype, 0.0, 255.0, channels_last)
    assert torch.equal(out, unaligned.permute(0, 3, 1, 2).to(dtype))
    assert set(emulated) == {("picture_to_float", int(channels_last))}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_on_a_cpu_makes_the_same_bytes(emulated, dtype):
    for strides in STRIDES:
        for shape, ends in zip(((2, 5, 8), (1, 6, 7), (1, 40, 36), (3, 1, 1)), RANGES, strict=True):
            x = numbers(shape, dtype)
            x = x if ends == (0.0, 255.0) else (x / 255 * (ends[1] - ends[0]) + ends[0]).to(dtype)
            if shape[0] > 1:
                x[1, 1, 0, 0] = torch.nan
            x = strides(x)
            x = guarded(x) if strides in (planes, dense_pixels) else x
            expected = ops.picture_to_uint8(x, *ends)
            out = picture.picture_to_uint8(x, *ends)
            assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
    assert {layout for _, layout in emulated} == {picture.PLANES, picture.PIXELS, picture.STRIDED}


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x = pixels(2, 5, 6, device)
    for dtype, channels_last in ((torch.float32, False), (torch.float16, True)):
        torch.library.opcheck(ops.picture_to_float, (x, (8, 8), dtype, -1.0, 1.0, channels_last))
    for strides in (planes, dense_pixels, turned):
        y = strides(torch.rand(2, 3, 4, 5, device=device)).requires_grad_()
        torch.library.opcheck(ops.picture_to_uint8, (y, 0.0, 1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.picture_to_float(torch.zeros(1, 4, 4, 3), (4, 4), torch.float32), "must be uint8"),
        (lambda: ops.picture_to_float(pixels(1, 4, 4)[0], (4, 4), torch.float32), "must be uint8"),
        (lambda: ops.picture_to_float(pixels(1, 4, 4), (3, 4), torch.float32), "smaller than the picture"),
        (lambda: ops.picture_to_float(pixels(1, 4, 4), (4, 4), torch.int32), "dtype must be"),
        (lambda: ops.picture_to_float(pixels(1, 4, 4), (4, 4), torch.float32, 1.0, 1.0), "must be below"),
        (lambda: ops.picture_to_uint8(torch.zeros(3, 4, 4)), "must be"),
        (lambda: ops.picture_to_uint8(pixels(1, 4, 4)), "must be"),
        (lambda: ops.picture_to_uint8(torch.zeros(1, 3, 4, 4), 1.0, 0.0), "must be below"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(RuntimeError, match=f"styleforge::picture_to_.*{message}"):
        call()
