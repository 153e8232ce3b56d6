"""The kernel of the last layer: its packing and index logic on the CPU, its pictures on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, picture, relative_error
from torch import Tensor

from sf_compile import ops
from sf_compile.cuda import hopper, last_conv
from sf_compile.cuda.last_conv import Variant
from sf_compile.ops.conv2d import Arguments
from sf_compile.ops.reference import activate_

MODES = ("zeros", "reflect", "replicate")


# ---- on the CPU: the kernel's index logic in float64 ---------------------------------------------------
def held_rows(variant: Variant, packed: Tensor) -> Tensor:
    """The product's left operand out of the fragments that threads hold (PTX ISA, wgmma m64k16)."""
    rows = torch.full((64, 16 * variant.steps), float("nan"), dtype=packed.dtype)
    step, thread, i = torch.meshgrid(*(torch.arange(n) for n in (variant.steps, 128, 8)), indexing="ij")
    warp, lane = thread // 32, thread % 32
    row = 16 * warp + lane // 4 + 8 * (i >> 1 & 1)
    column = 16 * step + 2 * (lane % 4) + (i & 1) + 8 * (i >> 2)
    rows[row, column] = packed
    return rows


def shared_rows(variant: Variant, packed: Tensor) -> Tensor:
    """The same out of shared memory: columns of 8 values lie 1024 bytes apart, rows 16 bytes."""
    flat = packed.flatten()
    step, half, row, i = torch.meshgrid(*(torch.arange(n) for n in (variant.steps, 2, 64, 8)), indexing="ij")
    rows = torch.full((64, 16 * variant.steps), float("nan"), dtype=packed.dtype)
    rows[row, 16 * step + 8 * half + i] = flat[1024 * step + 512 * half + 8 * row + i]
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
    rows = (held_rows if variant.held else shared_rows)(variant, packed)
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


@pytest.mark.parametrize(
    ("c", "o", "k"), [(32, 3, 9), (16, 3, 9), (8, 4, 7), (64, 3, 7), (64, 1, 3), (32, 4, 5)]
)
def test_packed_weights_meet_the_pixels_of_their_taps(c, o, k):
    weight = torch.randn(o, c, k, k, dtype=torch.float64)
    middle = k // 2
    for mma_n, mode in itertools.product(last_conv.COLUMNS, MODES):
        variant = Variant(1, 1, c, o, k, True, mma_n)
        if variant.memory() is None:
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


def test_every_kernel_fits_into_shared_memory():
    for source_name, constants in last_conv.variants():
        names = ("DTYPE", "PARAMETER", "CHANNELS", "OUT_CHANNELS", "KERNEL", "ACTIVATION", "MMA_N",
                 "OUTPUT_ACTIVATION")  # fmt: skip
        variant = Variant(*(constants[name] for name in names))
        slots, size = variant.memory()
        assert source_name == last_conv.SOURCE and size <= hopper.SHARED_BYTES
        assert constants["SLOTS"] == slots > variant.kernel and variant.planes <= 32
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
    for mma_n in last_conv.COLUMNS:
        targets = chunk_targets(column_bytes, mma_n * column_bytes)
        assert sorted(targets) == sorted(targets.values()) == list(range(0, mma_n * column_bytes, 16))
        for offset, target in targets.items():
            # Bits 4 and up are XORed with bits 7 and up, as many as the column has.
            assert target == offset ^ ((offset >> 7) % (column_bytes // 16) << 4)
            assert offset // 512 == target // 512  # 32 threads, 16 bytes each


# ---- on a GPU ------------------------------------------------------------------------------------------
hopper_only = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the fused convolutions need compute capability 9.0",
)


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(hopper_only(test))


def layer(
    shape: tuple[int, int, int, int], o: int, k: int, padding: tuple[int, int, int, int],
    mode: str = "reflect", dtype: torch.dtype = torch.float16, norm: bool = True, activation: str = "relu",
    bias: bool = True, output_activation: str = "none", channels_last: bool = False,
) -> Arguments:  # fmt: skip
    """A last layer with random weights, its input amid images of NaN."""
    n, c, h, w = shape
    around = torch.full((n + 2, c, h, w), float("nan"), dtype=dtype, device="cuda")
    around = around.contiguous(memory_format=torch.channels_last)
    x = around[1:-1]
    x.copy_(picture(shape, dtype, "channels_last", "cuda"))
    vectors: tuple[Tensor | None, ...] = (None,) * 4
    if norm:
        gamma, beta = (torch.randn(c, device="cuda").to(dtype) for _ in range(2))
        vectors = (*ops.instance_statistics(x), gamma, beta)
    return Arguments(
        x, (torch.randn(o, c, k, k, device="cuda") / (c * k * k) ** 0.5).to(dtype),
        torch.randn(o, device="cuda").to(dtype) if bias else None, *vectors, 1e-5, activation, None, 1,
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
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def steps(a: Arguments, dtype: torch.dtype) -> Tensor:
    """The layer one PyTorch step after the other, all in ``dtype``."""
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
    padded = F.pad(z, a.padding, mode={"zeros": "constant"}.get(a.padding_mode, a.padding_mode))
    out = F.conv2d(padded, a.weight.to(dtype), None if a.bias is None else a.bias.to(dtype))
    return activate_(out, a.output_activation)


def check(a: Arguments) -> None:
    out, exact, eager = convolved(a), steps(a, torch.float64), steps(a, a.input.dtype)
    assert out.shape == exact.shape and out.dtype == a.input.dtype
    allowed = 1.25 * relative_error(eager, exact) + torch.finfo(out.dtype).eps
    assert relative_error(out, exact) <= allowed


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 32, 5, 5), (2, 32, 37, 53), (3, 16, 64, 300), (1, 16, 33, 801)])
def test_transformer_net(shape, channels_last, mode, dtype):
    check(layer(shape, 3, 9, (4, 4, 4, 4), mode, dtype, channels_last=channels_last))


@gpu
@pytest.mark.parametrize("mma_n", last_conv.COLUMNS)
@pytest.mark.parametrize("channels", [16, 32])
def test_every_width_of_a_strip(channels, mma_n, monkeypatch):
    monkeypatch.setattr(last_conv, "COLUMNS", (mma_n,))
    last_conv._fastest.cache_clear()
    try:
        strip = Variant(1, 1, channels, 3, 9, True, mma_n).strip
        for width in (strip - 1, strip, strip + 1, 2 * strip + 5):
            check(layer((1, channels, 11, width), 3, 9, (4, 4, 4, 4)))
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
        check(layer((2, channels, 23, 190), o, k, padding, mode, output_activation="relu"))


@gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [(20, 30, 9, 7), (0, 39, 19, 0), (5, 0, 0, 11)])
def test_wide_and_uneven_padding(padding, mode):
    for channels in (16, 32):
        check(layer((2, channels, 20, 40), 3, 9, padding, mode))
    if mode != "reflect":  # strips that lie outside the picture
        check(layer((1, 32, 13, 20), 1, 9, (150, 300, 20, 30), mode))


@gpu
def test_without_norm_activation_and_bias():
    for activation, bias in itertools.product(("none", "relu"), (False, True)):
        check(layer((2, 32, 30, 70), 3, 9, (4,) * 4, norm=False, activation=activation, bias=bias))
    a = layer((2, 32, 30, 70), 3, 9, (4,) * 4, activation="none")
    check(a)
    check(a._replace(mean=a.mean[0].contiguous(), variance=a.variance[0].contiguous()))
    check(a._replace(norm_weight=a.norm_weight.float(), norm_bias=a.norm_bias.float()))


@gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "output",
    ["tanh", "tanh * 150.0 + 127.5", "sigmoid", "clamp(0.0, 0.7)", "hardtanh(-1.0, 1.0) * 0.5 + 0.5", "silu",
     "gelu", "gelu_tanh", "elu(1.0)", "leaky_relu(0.2)", "none * 255.0 + 0.0", "relu"],
)  # fmt: skip
def test_endings(output, channels_last):
    for activation, c, k in (("relu", 64, 7), ("leaky_relu(0.1)", 32, 9)):
        check(layer((2, c, 21, 143), 3, k, (k // 2,) * 4, activation=activation, output_activation=output,
                    channels_last=channels_last))  # fmt: skip


@gpu
def test_a_large_odd_picture():
    check(layer((1, 32, 1080, 1919), 3, 9, (4,) * 4))


@gpu
def test_the_same_bits_on_every_run():
    a = layer((2, 32, 250, 333), 3, 9, (4,) * 4)
    first = convolved(a)
    assert all(identical(first, convolved(a)) for _ in range(5))


@gpu
@pytest.mark.parametrize("channels", [16, 32, 64])
def test_nothing_is_written_outside_the_picture(channels, monkeypatch):
    surroundings = []

    def amid_sevens(shape, like, channels_last):
        count = torch.Size(shape).numel()
        memory = torch.full((count + 2 * 4096,), 7.0, dtype=like.dtype, device=like.device)
        surroundings.append(torch.cat((memory[:4096], memory[-4096:])))
        surroundings.append(memory)
        _, c, h, w = shape
        strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
        return memory[4096:-4096].as_strided(shape, strides, 4096)

    monkeypatch.setattr(last_conv, "empty_image", amid_sevens)
    for channels_last in (False, True):
        a = layer((2, channels, 31, 333), 3, 7, (3,) * 4, channels_last=channels_last)
        assert last_conv.refusal(a) is None
        out = last_conv.conv2d(a)[0]
        before, memory = surroundings[-2:]
        assert torch.equal(before, torch.cat((memory[:4096], memory[-4096:])))
        assert relative_error(out, steps(a, torch.float64)) < 2e-3


@gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("channels", [16, 32])
def test_what_is_not_finite_shows_where_eager_shows_it(channels, value):
    for activation in ("none", "relu"):
        a = layer((1, channels, 40, 60), 3, 9, (4,) * 4, norm=False, activation=activation)
        a.input[0, 5, 20, 31] = value
        out, eager = convolved(a), steps(a, torch.float16)
        finite = out.isfinite()
        assert not finite[~eager.isfinite()].any()
        # Zero weights spread it by a pixel, and no further.
        reach = F.max_pool2d((~eager.isfinite()).float(), 3, 1, 1) > 0
        assert finite[~reach].all()
    a = layer((1, channels, 40, 60), 3, 9, (4,) * 4)
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
    ):  # fmt: skip
        assert last_conv.refusal(refused) is not None


@gpu
def test_weights_changed_in_place_are_packed_anew():
    a = layer((1, 32, 20, 30), 3, 9, (4,) * 4)
    convolved(a)
    a.weight.mul_(-2)
    check(a)
