"""The kernel of the last layer: its packing and index logic on the CPU, its pictures on a GPU."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, picture, relative_error
from emulated_kernel import EmulatedKernel, guarded
from torch import Tensor

from sf_compile import ops, tf32
from sf_compile.cuda import hopper, last_conv
from sf_compile.cuda.last_conv import Variant
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.reference import activate_

MODES = ("zeros", "reflect", "replicate")


# ---- on the CPU: the kernel's index logic in float64 ---------------------------------------------------
def operand_rows(variant: Variant, packed: Tensor) -> Tensor:
    """The product's left operand out of the fragments that threads hold, and out of shared memory.

    Fragments are those of wgmma m64k16, or of float32 m64k8, in the PTX ISA. In shared memory, columns of 16
    bytes lie 1024 bytes apart, rows 16 bytes.
    """
    word = 4 // variant.element_bytes  # elements of 4 bytes
    rows = torch.full((64, 8 * word * variant.steps), float("nan"), dtype=packed.dtype)
    held, flat = variant.held, packed.flatten()
    step, thread, i = torch.meshgrid(*(torch.arange(n) for n in (held, 128, 4 * word)), indexing="ij")
    warp, lane, register = thread // 32, thread % 32, i // word
    row = 16 * warp + lane // 4 + 8 * (register & 1)
    column = 8 * word * step + word * (lane % 4) + i % word + 4 * word * (register >> 1)
    rows[row, column] = flat[512 * word * step + 4 * word * thread + i]
    counts = variant.steps - held, 2, 64, 4 * word
    step, half, row, i = torch.meshgrid(*(torch.arange(n) for n in counts), indexing="ij")
    step = step + held
    place = 512 * word * step + 256 * word * half + 4 * word * row + i
    rows[row, 8 * word * step + 4 * word * half + i] = flat[place]
    return rows


def source(at: int, size: int, end: int, mode: str) -> int:
    at = min(at, end - 1)
    if mode == "reflect":
        return min(abs(at), 2 * (size - 1) - abs(at))
    return min(max(at, 0), size - 1) if mode == "replicate" else at


def fetched(variant: Variant, x: Tensor, y0: int, x0: int, ends: tuple[int, int], mode: str) -> Tensor:
    """The input of a unit in the ring, (rows, pixels, channels); NaN where nothing is fetched."""
    c, height, width = x.shape
    count = min(variant.mma_n * variant.pixels, -(-(ends[1] - x0) // variant.pixels) * variant.pixels)
    ring = torch.full((variant.kernel + 1, variant.mma_n * variant.pixels, c), float("nan"), dtype=x.dtype)
    first = max(x0, 0)
    inside = max(min(x0 + count, width) - first, 0)
    before = min(max(-x0, 0), count)
    for i in range(variant.kernel + 1):
        y = source(y0 + i, height, ends[0], mode)
        if 0 <= y < height:
            ring[i, first - x0 : first - x0 + inside] = x[:, y, first : first + inside].T
            outside = [p for p in range(count) if p < before or p >= before + inside]
            for pixel in outside if mode != "zeros" else []:
                ring[i, pixel] = x[:, y, source(x0 + pixel, width, ends[1], mode)]
        beyond = [p for p in range(ring.shape[1]) if not (0 <= y < height and 0 <= x0 + p < width)]
        if mode == "zeros":
            ring[i, beyond] = 0
    return ring


def simulated(
    variant: Variant, packed: Tensor, x: Tensor, padding: tuple[int, int, int, int], mode: str
) -> Tensor:
    """What the kernel makes of one picture (C, H, W), from packed weights."""
    rows = operand_rows(variant, packed)
    left, right, top, bottom = padding
    k, o, pixels = variant.kernel, variant.out_channels, variant.pixels
    out_h, out_w = x.shape[1] + top + bottom - k + 1, x.shape[2] + left + right - k + 1
    ends = out_h + k - 1 - top, out_w + k - 1 - left
    out = torch.full((o, out_h, out_w), float("nan"), dtype=x.dtype)
    shifts, half = (k - 1) // pixels, variant.mma_n // 16 * 8
    for y, x0 in itertools.product(range(0, out_h, 2), range(0, out_w, variant.strip)):
        ring = fetched(variant, x, y - top, x0 - left, ends, mode)
        right_operand = ring.reshape(k + 1, variant.mma_n, -1).permute(0, 2, 1).reshape(-1, variant.mma_n)
        product = rows @ right_operand
        for p, (begin, columns) in itertools.product(
            range(2), ((0, half), (half, variant.mma_n - shifts - half))
        ):
            staged = half + 8 if begin == 0 else variant.mma_n - half
            assert staged <= variant.pitch
            planes = product[32 * p : 32 * p + variant.planes, begin : begin + staged]
            for e in range(pixels):
                taps = [pixels * shift + pixels - 1 - e for shift in range(shifts + 1)]
                added = sum(
                    planes[tap * o : tap * o + o, shift : shift + columns] for shift, tap in enumerate(taps)
                )
                at = x0 + begin * pixels + e
                count = len(range(at, min(out_w, at + columns * pixels), pixels))
                if y + p < out_h and count > 0:
                    out[:, y + p, at : at + (count - 1) * pixels + 1 : pixels] = added[:, :count]
    return out


def reference(x: Tensor, weight: Tensor, padding: tuple[int, int, int, int], mode: str) -> Tensor:
    padded = F.pad(x, padding, mode={"zeros": "constant"}.get(mode, mode))
    return F.conv2d(padded, weight)


@pytest.mark.parametrize("dtype", [0, 1])
@pytest.mark.parametrize(
    ("c", "o", "k"), [(32, 3, 9), (16, 3, 9), (8, 4, 7), (64, 3, 7), (64, 1, 3), (32, 4, 5)]
)
def test_packed_weights_meet_the_pixels_of_their_taps(c, o, k, dtype):
    weight = torch.randn(o, c, k, k, dtype=torch.float64)
    middle = k // 2
    for mma_n, mode in itertools.product(last_conv.COLUMNS[dtype], MODES):
        variant = Variant(dtype, dtype, c, o, k, True, mma_n)
        if variant.memory() is None or variant.column_bytes > 128:
            continue
        packed = last_conv.pack(variant, weight)
        for (height, width), padding in (
            ((middle + 3, middle + 2), (middle,) * 4),
            ((6, 2 * variant.strip + 7), (middle,) * 4),
            ((7, variant.strip + 1), (0, 5, 1, 4)),
            ((k + 1, k), (0, 0, 0, 0)),
            ((k, variant.strip - 1), (6, 1, 2, 0)),
        ):
            x = torch.randn(c, height, width, dtype=torch.float64)
            out = simulated(variant, packed, x, padding, mode)
            expected = reference(x[None], weight, padding, mode)[0]
            torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


def test_the_kernels_of_float32():
    """As many weights as find room are in registers; of every layer there are kernels to choose from."""
    for c, k, mma_n, held, steps in ((32, 9, 136, 29, 40), (16, 7, 96, 32, 32), (8, 9, 200, 20, 20)):
        variant = Variant(0, 0, c, 3, k, 1, mma_n)
        assert (variant.held, variant.steps) == (held, steps)
    for channels, k in itertools.product((8, 16, 32), (3, 5, 7, 9)):
        kinds = [Variant(0, 0, channels, 3, k, 1, mma_n) for mma_n in last_conv.COLUMNS[0]]
        assert sum(kind.memory() is not None for kind in kinds) >= 2


def test_weights_are_rounded_to_tf32():
    for channels, mma_n in ((32, 136), (8, 200)):
        variant = Variant(0, 0, channels, 3, 9, 1, mma_n)
        weight = torch.randn(3, channels, 9, 9)
        packed = last_conv.pack(variant, weight)
        assert packed.dtype == torch.float32 and packed.is_contiguous()
        assert packed.numel() * 4 == 2048 * variant.steps
        assert not (packed.view(torch.int32) & 0x1FFF).any()
        rows = operand_rows(variant, packed)
        exact = last_conv.product_rows(variant, weight)
        assert ((rows - exact).abs() <= 2**-11 * exact.abs()).all()


def test_every_kernel_fits_into_shared_memory():
    for source_name, constants in last_conv.variants():
        names = ("DTYPE", "PARAMETER", "CHANNELS", "OUT_CHANNELS", "KERNEL", "ACTIVATION", "MMA_N",
                 "OUTPUT_ACTIVATION")  # fmt: skip
        variant = Variant(*(constants[name] for name in names))
        slots, size = variant.memory()
        assert source_name == last_conv.SOURCE and size <= hopper.SHARED_BYTES
        assert constants["SLOTS"] == slots > variant.kernel and variant.planes <= 32
        assert variant.column_bytes in (32, 64, 128)
        assert variant.pitch % 32 in (8, 24)


def chunk_targets(column_bytes: int, row_bytes: int) -> dict[int, int]:
    """Where csrc/last_conv.cu moves the 16-byte chunk at an offset of a row, thread by thread."""
    chunks, step = column_bytes // 16, 96 * 16
    targets: dict[int, int] = {}
    for thread, j in itertools.product(range(96), range(-(-row_bytes // step))):
        mine = thread * 16
        if mine + j * step < row_bytes:
            to = mine ^ (mine // 128 % chunks * 16)
            targets[mine + j * step] = (to ^ (j * (step // 128) % chunks * 16)) + j * step
    return targets


@pytest.mark.parametrize("column_bytes", [32, 64, 128])
def test_chunks_move_within_a_warp_to_where_the_swizzle_has_them(column_bytes):
    for mma_n in sorted({n for columns in last_conv.COLUMNS.values() for n in columns}):
        targets = chunk_targets(column_bytes, mma_n * column_bytes)
        assert sorted(targets) == sorted(targets.values()) == list(range(0, mma_n * column_bytes, 16))
        for offset, target in targets.items():
            # Bits 4 and up are XORed with bits 7 and up, as many as the column has.
            assert target == offset ^ ((offset >> 7) % (column_bytes // 16) << 4)
            assert offset // 512 == target // 512  # 32 threads, 16 bytes each


# ---- on the CPU: the source, emulated --------------------------------------------------------------------
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++")
@pytest.mark.parametrize(
    ("dtype", "mma_n", "shape", "o", "k", "padding", "mode", "activations", "norm"),
    [
        (torch.float32, 136, (1, 32, 5, 137), 3, 9, (4, 4, 4, 4), "reflect", ("relu", "none"), True),
        (torch.float32, 96, (2, 32, 4, 97), 3, 9, (4, 3, 2, 5), "zeros", ("none", "tanh"), True),
        (torch.float32, 136, (2, 16, 5, 20), 3, 9, (4, 5, 4, 4), "replicate", ("relu", "none"), False),
        (torch.float32, 200, (1, 8, 9, 30), 4, 7, (3, 370, 2, 3), "zeros", ("leaky_relu(0.2)", "relu"), True),
        (torch.float16, 200, (1, 32, 5, 60), 3, 9, (4, 4, 4, 4), "reflect", ("relu", "none"), True),
        (torch.bfloat16, 128, (2, 64, 5, 20), 3, 7, (3, 3, 3, 3), "zeros", ("relu", "none"), True),
    ],
)
def test_the_source_against_float64(dtype, mma_n, shape, o, k, padding, mode, activations, norm, monkeypatch):
    kernels = []

    def kernel(index, variant, launch_mode):
        seed = 17 * len(kernels) + 1
        kernels.append(EmulatedKernel(variant.constants(), last_conv._SIGNATURE, seed, last_conv.SOURCE))
        return kernels[-1]

    monkeypatch.setattr(last_conv, "_kernel", kernel)
    monkeypatch.setattr(last_conv, "multiprocessors", lambda index: 2)
    monkeypatch.setitem(last_conv.COLUMNS, hopper.OPERANDS[dtype], (mma_n,))
    last_conv._fastest.cache_clear()
    try:
        before, after = activations
        a = layer(shape, o, k, padding, mode, dtype, norm, before, True, after, shape[0] > 1, "cpu")
        a = a._replace(input=guarded(a.input))
        out = last_conv.conv2d(a)[0]
        compare(a, out)
        assert identical(out, last_conv.conv2d(a)[0])  # whatever warps run first
    finally:
        last_conv._fastest.cache_clear()


# ---- on a GPU ------------------------------------------------------------------------------------------
def gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.usefixtures("hopper_kernels")(test))


def layer(
    shape: tuple[int, int, int, int], o: int, k: int, padding: tuple[int, int, int, int],
    mode: str = "reflect", dtype: torch.dtype = torch.float16, norm: bool = True, activation: str = "relu",
    bias: bool = True, output_activation: str = "none", channels_last: bool = False, device: str = "cuda",
) -> Arguments:  # fmt: skip
    """A last layer with random weights, its input amid images of NaN."""
    n, c, h, w = shape
    around = torch.full((n + 2, c, h, w), float("nan"), dtype=dtype, device=device)
    around = around.contiguous(memory_format=torch.channels_last)
    x = around[1:-1]
    x.copy_(picture(shape, dtype, "channels_last", device))
    vectors: tuple[Tensor | None, ...] = (None,) * 4
    if norm:
        gamma, beta = (torch.randn(c, device=device).to(dtype) for _ in range(2))
        vectors = (*ops.instance_statistics(x), gamma, beta)
    return Arguments(
        x, (torch.randn(o, c, k, k, device=device) / (c * k * k) ** 0.5).to(dtype),
        torch.randn(o, device=device).to(dtype) if bias else None, *vectors, 1e-5, activation, None, 1,
        list(padding), mode, [1, 1], output_activation, False, False, channels_last,
    )  # fmt: skip


def convolved(a: Arguments) -> Tensor:
    """The op's output, which has to come from this kernel."""
    assert last_conv.refusal(a) is None
    output, mean, variance, kept = ops.conv2d(*a)
    assert mean.numel() == variance.numel() == kept.numel() == 0
    assert output.is_contiguous(memory_format=LAYOUTS["channels_last" if a.channels_last else "contiguous"])
    assert identical(output, last_conv.conv2d(a)[0])
    return output


def identical(a: Tensor, b: Tensor) -> bool:
    bits = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.view(bits), b.view(bits))


def steps(a: Arguments, dtype: torch.dtype, rounded: bool = False) -> Tensor:
    """The layer one PyTorch step after the other, all in ``dtype``; operands ``rounded`` to TF32."""
    z = a.input.to(dtype)
    if a.mean is not None:
        if dtype == torch.float64:
            mean, variance, gamma, beta = (v.double().reshape(-1, z.shape[1], 1, 1) for v in a.norm[:4])
            z = (z - mean) / torch.sqrt(variance + a.eps) * gamma + beta
        elif a.mean.dim() == 2:
            z = F.instance_norm(z, weight=a.norm_weight, bias=a.norm_bias, eps=a.eps)
        else:
            z = F.batch_norm(z, a.mean, a.variance, a.norm_weight.float(), a.norm_bias.float(), eps=a.eps)
    z = activate_(z.clone(), a.activation)
    weight = a.weight
    if rounded:
        z, weight = tf32.rounded(z.float()).to(dtype), tf32.rounded(weight)
    padded = F.pad(z, a.padding, mode={"zeros": "constant"}.get(a.padding_mode, a.padding_mode))
    out = F.conv2d(padded, weight.to(dtype), None if a.bias is None else a.bias.to(dtype))
    return activate_(out, a.output_activation)


def check(a: Arguments) -> None:
    compare(a, convolved(a))


def compare(a: Arguments, out: Tensor) -> None:
    exact, eager = steps(a, torch.float64), steps(a, a.input.dtype)
    assert out.shape == exact.shape and out.dtype == a.input.dtype
    error = relative_error(eager, exact)
    if out.dtype == torch.float32:  # not everywhere where it may does cuDNN take TF32
        error = max(error, relative_error(steps(a, torch.float64, rounded=True), exact))
    assert relative_error(out, exact) <= 1.25 * error + torch.finfo(out.dtype).eps


@gpu
@pytest.mark.parametrize("dtype", hopper.OPERANDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 32, 5, 5), (2, 32, 37, 53), (3, 16, 64, 300), (1, 16, 33, 801)])
def test_transformer_net(shape, channels_last, mode, dtype):
    check(layer(shape, 3, 9, (4, 4, 4, 4), mode, dtype, channels_last=channels_last))


@gpu
@pytest.mark.parametrize(
    ("dtype", "mma_n"),
    [
        *((torch.float16, mma_n) for mma_n in last_conv.COLUMNS[1]),
        *((torch.float32, mma_n) for mma_n in last_conv.COLUMNS[0]),
    ],
)
@pytest.mark.parametrize("channels", [8, 16, 32])
def test_every_width_of_a_strip(channels, dtype, mma_n, monkeypatch):
    code = hopper.OPERANDS[dtype]
    monkeypatch.setitem(last_conv.COLUMNS, code, (mma_n,))
    last_conv._fastest.cache_clear()
    variants = (Variant(code, code, channels, 3, k, True, mma_n) for k in (9, 7, 5))
    variant = next(variant for variant in variants if variant.memory() is not None)
    try:
        for width in (variant.strip - 1, variant.strip, variant.strip + 1, 2 * variant.strip + 5):
            check(layer((1, channels, 11, width), 3, variant.kernel, (4, 4, 4, 4), dtype=dtype))
    finally:
        last_conv._fastest.cache_clear()


@gpu
@pytest.mark.parametrize(
    ("channels", "k", "o"),
    [(8, 3, 4), (8, 5, 1), (8, 7, 4), (8, 9, 3), (16, 3, 1), (16, 5, 4), (16, 7, 2), (32, 3, 3), (32, 5, 2),
     (32, 7, 4), (64, 3, 2), (64, 5, 1), (64, 5, 4), (64, 7, 3)],
)  # fmt: skip
def test_other_channels_and_kernels(channels, k, o):
    for padding, mode in (((k // 2,) * 4, "reflect"), ((0, 3, 2, 1), "replicate"), ((0, 0, 0, 0), "zeros")):
        for dtype in (torch.float16, torch.float32) if channels < 64 else (torch.float16,):
            check(layer((2, channels, 23, 190), o, k, padding, mode, dtype, output_activation="relu"))


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [(20, 30, 9, 7), (0, 39, 19, 0), (5, 0, 0, 11)])
def test_wide_and_uneven_padding(padding, mode, dtype):
    for channels in (8, 16, 32):
        check(layer((2, channels, 20, 40), 3, 9, padding, mode, dtype))
    if mode != "reflect":  # strips that lie outside the picture
        check(layer((1, 32, 13, 20), 1, 9, (150, 300, 20, 30), mode, dtype))


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_without_norm_activation_and_bias(dtype):
    activations = ("none", "relu", "leaky_relu(0.2)", "hardtanh(0.0, 6.0)")
    for activation, bias in itertools.product(activations, (False, True)):
        check(layer((2, 32, 30, 70), 3, 9, (4,) * 4, "reflect", dtype, False, activation, bias))
    a = layer((2, 32, 30, 70), 3, 9, (4,) * 4, dtype=dtype, activation="none")
    check(a)
    check(a._replace(mean=a.mean[0].contiguous(), variance=a.variance[0].contiguous()))
    check(a._replace(norm_weight=a.norm_weight.float(), norm_bias=a.norm_bias.float()))


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "output",
    ["tanh", "tanh * 150.0 + 127.5", "sigmoid", "clamp(0.0, 0.7)", "hardtanh(-1.0, 1.0) * 0.5 + 0.5", "silu",
     "gelu", "gelu_tanh", "elu(1.0)", "leaky_relu(0.2)", "none * 255.0 + 0.0", "relu"],
)  # fmt: skip
def test_endings(output, channels_last, dtype):
    for activation, c, k in (("relu", 64 if dtype == torch.float16 else 32, 7), ("leaky_relu(0.1)", 32, 9)):
        check(layer((2, c, 21, 143), 3, k, (k // 2,) * 4, dtype=dtype, activation=activation,
                    output_activation=output, channels_last=channels_last))  # fmt: skip


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_large_odd_picture(dtype):
    check(layer((1, 32, 1080, 1919), 3, 9, (4,) * 4, dtype=dtype))


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_same_bits_on_every_run(dtype):
    a = layer((2, 32, 250, 333), 3, 9, (4,) * 4, dtype=dtype)
    first = convolved(a)
    assert all(identical(first, convolved(a)) for _ in range(5))


@gpu
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(16, torch.float16), (32, torch.float16), (64, torch.float16), (16, torch.float32), (32, torch.float32)],
)
def test_nothing_is_written_outside_the_picture(channels, dtype, monkeypatch):
    surroundings = []

    def amid_sevens(shape, like, channels_last, dtype=None):
        count = torch.Size(shape).numel()
        memory = torch.full((count + 2 * 4096,), 7.0, dtype=like.dtype, device=like.device)
        surroundings.append(torch.cat((memory[:4096], memory[-4096:])))
        surroundings.append(memory)
        _, c, h, w = shape
        strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
        return memory[4096:-4096].as_strided(shape, strides, 4096)

    monkeypatch.setattr(last_conv, "empty_image", amid_sevens)
    for channels_last in (False, True):
        a = layer((2, channels, 31, 333), 3, 7, (3,) * 4, dtype=dtype, channels_last=channels_last)
        assert last_conv.refusal(a) is None
        out = last_conv.conv2d(a)[0]
        before, memory = surroundings[-2:]
        assert torch.equal(before, torch.cat((memory[:4096], memory[-4096:])))
        assert relative_error(out, steps(a, torch.float64)) < 2e-3


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("channels", [16, 32])
def test_what_is_not_finite_shows_where_eager_shows_it(channels, value, dtype):
    for activation in ("none", "relu"):
        a = layer((1, channels, 40, 60), 3, 9, (4,) * 4, dtype=dtype, norm=False, activation=activation)
        a.input[0, 5, 20, 31] = value
        # In float32 cuDNN may take an FFT, which spreads it over the picture.
        out, eager = convolved(a), steps(a, torch.float16 if dtype == torch.float16 else torch.float64)
        finite = out.isfinite()
        assert not finite[~eager.isfinite()].any()
        # Zero weights spread it by a pixel, and no further.
        reach = F.max_pool2d((~eager.isfinite()).float(), 3, 1, 1) > 0
        assert finite[~reach].all()
    a = layer((1, channels, 40, 60), 3, 9, (4,) * 4, dtype=dtype)
    a.input[0, 5, 20, 31] = value
    mean, variance = ops.instance_statistics(a.input)
    assert convolved(a._replace(mean=mean, variance=variance)).isnan().all()


@gpu
def test_what_it_refuses():
    a = layer((1, 32, 20, 30), 3, 9, (4,) * 4)
    assert last_conv.refusal(a) is None
    wide = layer((1, 64, 20, 30), 3, 9, (4,) * 4)
    for refused in (
        a._replace(residual=a.input), a._replace(keep_input=True), a._replace(statistics=True),
        a._replace(upsample=2), a._replace(stride=[2, 2]), a._replace(input=a.input.contiguous()),
        a._replace(input=a.input.float(), weight=a.weight.float()), wide,
        a._replace(padding=[4, 4, 0, 0], input=a.input[:, :, :10]),
        layer((1, 64, 20, 30), 3, 3, (1,) * 4, dtype=torch.float32),
    ):  # fmt: skip
        assert last_conv.refusal(refused) is not None


@gpu
def test_float32_where_tf32_is_forbidden(strict_float32):
    a = layer((1, 32, 20, 30), 3, 9, (4,) * 4, dtype=torch.float32)
    assert "TF32" in last_conv.refusal(a)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_changed_in_place_are_packed_anew(dtype):
    a = layer((1, 32, 20, 30), 3, 9, (4,) * 4, dtype=dtype)
    convolved(a)
    a.weight.mul_(-2)
    check(a)
