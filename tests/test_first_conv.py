"""The first layer's kernel: its index logic on the CPU, and what it computes on compute capability 9.0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from torch import Tensor

from sf_compile import ops, tf32
from sf_compile.cuda import first_conv, hopper
from sf_compile.cuda.loader import loaded
from sf_compile.ops import reference
from sf_compile.ops.conv2d_arguments import Arguments

MODES = ("zeros", "reflect", "replicate")


def arguments(
    x: Tensor, weight: Tensor, padding: list[int], mode: str = "reflect", bias: Tensor | None = None,
    activation: str = "none", statistics: bool = True,
) -> Arguments:  # fmt: skip
    return Arguments(
        x, weight, bias, None, None, None, None, 1e-5, "none", None, 1, padding, mode, [1, 1], activation,
        statistics, False, True,
    )  # fmt: skip


def convolution(a: Arguments, dtype: torch.dtype) -> Tensor:
    """What the layer computes, out of PyTorch's own operators in ``dtype``."""
    x, weight = a.input.to(dtype), a.weight.to(dtype)
    x = F.pad(x, a.padding, mode="constant" if a.padding_mode == "zeros" else a.padding_mode)
    out = F.conv2d(x, weight, None if a.bias is None else a.bias.to(dtype))
    return reference.activate_(out, a.output_activation)


# ---- on the CPU: the kernel's index logic, in float64 ------------------------------------------------


def sources(positions: Tensor, size: int, mode: str) -> Tensor:
    """The pixels at ``positions`` of a padded dimension, as the kernel finds them; -1 for a zero."""
    last = size - 1
    if mode == "zeros":
        return torch.where((positions >= 0) & (positions <= last), positions, -1)
    if mode == "reflect":
        return torch.minimum(positions.abs(), 2 * last - positions.abs())
    return positions.clamp(0, last)


def packed_row(x: Tensor, a: Arguments, row: int, column: int, pixels: int, padded_width: int) -> Tensor:
    """[x][4 channels] of one row of the padded picture, as a warp packs it."""
    values = torch.zeros(pixels, 4, dtype=x.dtype)
    from_y = int(sources(torch.tensor(row - a.padding[2]), x.shape[1], a.padding_mode))
    at = column + torch.arange(pixels)
    from_x = sources(at - a.padding[0], x.shape[2], a.padding_mode)
    there = (at < padded_width) & (from_x >= 0) & (from_y >= 0)
    values[there, : x.shape[0]] = x[:, from_y, from_x[there]].T
    return values


def simulate(a: Arguments, form: first_conv.Form, mma_n: int, blocks: int) -> Tensor:
    """The kernel's output, from packed weights and a ring of rows addressed as the kernel does."""
    n, out_channels, kernel = a.input.shape[0], a.weight.shape[0], a.weight.shape[2]
    height, width = first_conv.output_size(a)
    strip, input_rows, chunks = form.strip(mma_n), form.input_rows(kernel), form.chunks(kernel)
    pixels, chunk, unit_rows = strip + kernel - 1, 4 * form.adjacent, -(-height // form.rows)
    strips, pitch = -(-width // strip), 4 * pixels  # in elements, as all that follows
    row_steps, row_pairs, tail_steps = chunks // 2, input_rows // 2, (input_rows + 1) // 2 * (chunks % 2)
    out = torch.full((n, out_channels, height, width), float("nan"), dtype=a.input.dtype)
    units = n * strips * unit_rows
    for group, weights in enumerate(first_conv.arranged(a.weight, form)):
        assert weights.shape == (form.steps(kernel), 2, 64, chunk)
        for block in range(blocks):
            ring = torch.full((form.slots * pitch,), float("nan"), dtype=a.input.dtype)
            first, end = units * block // blocks, units * (block + 1) // blocks
            unit, column, row, packed = first % unit_rows, first // unit_rows, 0, 0
            for _ in range(first, end):
                image, x0, y = column // strips, column % strips * strip, form.rows * unit
                while packed < row + input_rows:
                    start = packed % form.slots * pitch
                    values = packed_row(a.input[image], a, y + packed - row, x0, pixels, width + kernel - 1)
                    ring[start : start + pitch] = values.flatten()
                    packed += 1
                slot = [(row + r) % form.slots * pitch for r in range(input_rows)]
                steps = [
                    (r * row_steps + k, slot[r] + 2 * chunk * k, chunk)
                    for r in range(input_rows)
                    for k in range(row_steps)
                ]
                if tail_steps:
                    odd = row % 2 if input_rows % 2 else 0
                    tail = input_rows * row_steps + odd * tail_steps
                    for k in range(row_pairs):
                        steps.append((tail + k, slot[odd + 2 * k] + chunk * (chunks - 1), pitch))
                    if input_rows % 2:
                        alone = 0 if odd else input_rows - 1
                        steps.append((tail + row_pairs, slot[alone] + chunk * (chunks - 2), chunk))
                product = torch.zeros(64, mma_n, dtype=a.input.dtype)
                for step, address, leading in steps:
                    for half in (0, 1):
                        windows = ring.as_strided((mma_n, chunk), (chunk, 1), address + half * leading)
                        product += weights[step, half] @ windows.T
                channels, columns = min(32, out_channels - 32 * group), min(strip, width - x0)
                rows = min(form.rows, height - y)
                outputs = product.view(form.rows, form.adjacent, 32, mma_n).permute(2, 0, 3, 1)
                outputs = outputs.reshape(32, form.rows, strip)[:channels, :rows, :columns]
                out[image, 32 * group :][:channels, y : y + rows, x0 : x0 + columns] = outputs
                last = unit == unit_rows - 1
                row += input_rows if last else form.rows
                column, unit = column + last, 0 if last else unit + 1
    return out


@pytest.mark.parametrize("form", [first_conv.SIXTEEN_BIT, first_conv.TF32], ids=["16 bits", "TF32"])
@pytest.mark.parametrize("kernel", first_conv.KERNELS)
@pytest.mark.parametrize(
    ("shape", "out_channels", "padding", "blocks"),
    [
        pytest.param((1, 3, 11, 41), 32, None, 1, id="one block, whole and ragged strips"),
        pytest.param((2, 3, 10, 33), 24, None, 5, id="blocks that begin inside a strip"),
        pytest.param((3, 1, 9, 9), 8, [0, 0, 0, 0], 2, id="no padding, one channel, images in a block"),
        pytest.param((1, 4, 13, 17), 40, [4, 1, 0, 3], 3, id="every side its own padding, two groups"),
    ],
)
def test_packed_weights_meet_their_pixels(kernel, shape, out_channels, padding, blocks, form):
    # Whole numbers, so that float64 is exact in any order.
    x = torch.randint(-9, 10, shape).double()
    weight = torch.randint(-9, 10, (out_channels, shape[1], kernel, kernel)).double()
    for mode in MODES:
        a = arguments(x, weight, padding or [kernel // 2] * 4, mode)
        assert torch.equal(simulate(a, form, 8, blocks), convolution(a, torch.float64))


def test_float32_weights_are_packed_as_tf32():
    weight = torch.randn(24, 3, 7, 7)
    packed = first_conv.pack(weight)
    assert torch.equal(packed, first_conv.arranged(tf32.rounded(weight), first_conv.TF32))
    assert packed.dtype == torch.float32 and not (packed.view(torch.int32) & 0x1FFF).any()


def test_float32_results_are_staged_as_the_copy_engine_reads_them():
    """Every result at its place of [row][pixel][32 channels], swizzled, and no two lanes in one bank."""
    mma_n = 24
    staged = torch.full((2 * mma_n * 32,), -1)
    for warp in range(4):
        part, half = warp // 2, warp % 2
        lane = torch.arange(32)
        pixel = lane % 4 * 2
        chunk = (half * 4 + lane // 16) ^ pixel
        to = part * mma_n * 128 + pixel * 128 + chunk * 16 + lane // 4 % 4 * 4
        for g in range(mma_n // 8):
            for i in (0, 1):
                for second in (0, 1):
                    address = ((to ^ 32 * i ^ 16 * second) + 128 * second + g * 1024) // 4
                    assert address.unique().numel() == (address % 32).unique().numel() == 32
                    channel, at = half * 16 + 8 * i + lane // 4, 8 * g + pixel + second
                    staged[address] = (part * mma_n + at) * 32 + channel
    word = torch.arange(staged.numel())
    assert torch.equal(staged[word ^ word // 32 % 8 * 4], word)


def test_strips_are_stored_in_whole_boxes():
    for form in first_conv.FORMS.values():
        for mma_n, box in form.boxes.items():
            assert form.strip(mma_n) % box == 0 and box % (8 * form.adjacent) == 0 and box <= 256
    for dtype, form in first_conv.FORMS.items():
        for kernel in first_conv.KERNELS:
            for width in (1, 53, 300, 512, 1280, 1919, 1920, 3840):
                assert first_conv.columns(width, kernel, dtype) in form.widths(kernel)
    assert [first_conv.columns(width, 9, 1) for width in (512, 1920, 3840)] == [256, 240, 240]
    assert [first_conv.columns(width, 9, 0) for width in (512, 1280, 1920, 3840)] == [128, 184, 192, 192]


def test_every_variant_fits_into_shared_memory():
    made = list(first_conv.variants())
    assert 20 < len(made) < 36 and len({tuple(constants.items()) for _, constants in made}) == len(made)
    for _, constants in made:
        assert constants["MMA_N"] in first_conv.FORMS[constants["DTYPE"]].widths(constants["KERNEL"])
    for kernel in first_conv.KERNELS:
        assert first_conv.SIXTEEN_BIT.widths(kernel) == list(first_conv.SIXTEEN_BIT.boxes)
    assert first_conv.TF32.widths(9) == [128, 184, 192]


def test_refusals_name_the_reason(monkeypatch):
    monkeypatch.setattr(hopper, "refusal", lambda a: None)
    x, weight = torch.zeros(1, 3, 16, 16).half(), torch.zeros(32, 3, 9, 9).half()
    a = arguments(x, weight, [4, 4, 4, 4])
    assert first_conv.refusal(a) is None

    def kernel(out_channels, channels, height, width):
        shape = (out_channels, channels, height, width)
        return {"weight": torch.zeros(shape).half(), "input": torch.zeros(1, channels, 16, 16).half()}

    for change, reason in (
        (kernel(32, 5, 9, 9), "1 to 4 channels"),
        (kernel(30, 3, 9, 9), "multiple of 8"),
        (kernel(136, 3, 9, 9), "up to 128"),
        (kernel(32, 3, 4, 4), "square kernels"),
        (kernel(32, 3, 3, 9), "square kernels"),
        (kernel(32, 3, 11, 11), "square kernels"),
        ({"stride": [2, 2]}, "stride 1"),
        ({"upsample": 2}, "only pads"),
        ({"activation": "relu"}, "only pads"),
        ({"channels_last": False}, "channels_last"),
    ):
        assert reason in first_conv.refusal(a._replace(**change))
    monkeypatch.undo()
    assert "9.0" in first_conv.refusal(a)


# ---- on the GPU --------------------------------------------------------------------------------------

CASES = [
    # shape, out channels, kernel, padding (l, r, t, b), mode
    pytest.param((1, 3, 5, 5), 32, 9, [4, 4, 4, 4], "reflect", id="smallest picture"),
    pytest.param((2, 3, 37, 53), 32, 9, [4, 4, 4, 4], "reflect", id="odd sizes"),
    pytest.param((3, 3, 64, 300), 32, 9, [4, 4, 4, 4], "reflect", id="three images"),
    pytest.param((1, 3, 1080, 1919), 32, 9, [4, 4, 4, 4], "reflect", id="1080p less a column"),
    pytest.param((1, 3, 530, 513), 32, 9, [4, 4, 4, 4], "reflect", id="one pixel beyond a strip"),
    pytest.param((1, 3, 200, 512), 16, 9, [4, 4, 4, 4], "zeros", id="half a group"),
    pytest.param((2, 1, 40, 70), 32, 9, [4, 4, 4, 4], "replicate", id="grey"),
    pytest.param((2, 4, 33, 520), 32, 5, [0, 3, 2, 1], "replicate", id="four channels, 5x5"),
    pytest.param((1, 3, 31, 300), 64, 7, [3, 3, 3, 3], "reflect", id="two groups, 7x7"),
    pytest.param((3, 3, 20, 24), 40, 3, [1, 1, 1, 1], "zeros", id="ragged group, 3x3"),
    pytest.param((1, 2, 50, 1000), 128, 3, [1, 1, 1, 1], "reflect", id="four groups"),
    pytest.param((2, 3, 9, 9), 8, 9, [0, 0, 0, 0], "zeros", id="one output pixel"),
    pytest.param((7, 3, 9, 1100), 32, 9, [4, 4, 0, 0], "zeros", id="one output row"),
    pytest.param((64, 3, 9, 3000), 24, 9, [0, 0, 0, 0], "reflect", id="64 images of one output row"),
    pytest.param((64, 3, 10, 2000), 32, 9, [0, 0, 0, 0], "zeros", id="64 images of two output rows"),
    pytest.param((1, 3, 6, 3000), 32, 5, [9, 20, 8, 7], "zeros", id="padding wider than the kernel"),
]


DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TWO_DTYPES = [torch.float16, torch.float32]  # where 16 bits are 16 bits


def made(shape, out_channels, kernel, padding, mode, dtype=torch.float16, **kwargs) -> Arguments:
    """Arguments on the GPU, the picture in the midst of NaN."""
    margin = 4096
    x = torch.full((margin + torch.Size(shape).numel() + margin,), float("nan"), dtype=dtype, device="cuda")
    x = x[margin:-margin].view(shape).copy_(torch.rand(shape, dtype=torch.float64) * 4 - 1)
    weight = torch.randn(out_channels, shape[1], kernel, kernel) / kernel / shape[1] ** 0.5
    return arguments(x, weight.to(dtype).cuda(), padding, mode, **kwargs)


def run(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    assert first_conv.refusal(a) is None
    out, mean, variance, kept = ops.conv2d(*a)
    assert any(kernel.key.source == first_conv.SOURCE for kernel in loaded())
    assert kept.numel() == 0 and out.is_contiguous(memory_format=torch.channels_last)
    return out, mean, variance


def check_output(a: Arguments, out: Tensor) -> None:
    exact = convolution(a, torch.float64)
    error = relative_error(convolution(a, out.dtype), exact)
    if out.dtype == torch.float32:
        # What the products should be given: both operands rounded to the nearest number of TF32.
        # cuDNN may take a kernel that is more exact.
        rounded = a._replace(input=tf32.rounded(a.input), weight=tf32.rounded(a.weight))
        nearest = convolution(rounded, torch.float64)
        assert relative_error(out, nearest) <= 2e-5
        error = max(error, relative_error(nearest, exact))
    allowed = 1.25 * error + torch.finfo(out.dtype).eps
    assert out.shape == exact.shape and relative_error(out, exact) <= allowed


def check_statistics(out: Tensor, mean: Tensor, variance: Tensor) -> None:
    """The statistics are those of what was written, to a few units of float32."""
    exact_variance, exact_mean = torch.var_mean(out.double(), (2, 3), correction=0)
    deviation, size = exact_variance.sqrt(), exact_mean.abs()
    assert ((mean - exact_mean).abs() <= 1e-6 * deviation + 1e-6 * size + 1e-8).all()
    assert ((variance - exact_variance).abs() <= 1e-5 * exact_variance + 1e-8 * (1 + size)).all()
    assert (variance >= 0).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_kernels")
class TestKernel:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("shape", "out_channels", "kernel", "padding", "mode"), CASES)
    def test_against_float64(self, shape, out_channels, kernel, padding, mode, dtype):
        a = made(shape, out_channels, kernel, padding, mode, dtype)
        out, mean, variance = run(a)
        check_output(a, out)
        check_statistics(out, mean, variance)

    @pytest.mark.parametrize(
        ("dtype", "kernel", "mma_n"),
        [
            (dtype, kernel, mma_n)
            for dtype in TWO_DTYPES
            for kernel in first_conv.KERNELS
            for mma_n in first_conv.FORMS[hopper.OPERANDS[dtype]].widths(kernel)
        ],
    )
    def test_every_strip_width(self, dtype, kernel, mma_n, monkeypatch):
        monkeypatch.setattr(first_conv, "columns", lambda width, kernel, dtype: mma_n)
        a = made((2, 3, 19, 1201), 32, kernel, [kernel // 2] * 4, "reflect", dtype)
        out, mean, variance = run(a)
        check_output(a, out)
        check_statistics(out, mean, variance)

    @pytest.mark.parametrize("dtype", TWO_DTYPES)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu(0.2)", "silu", "gelu * 2.0 + 1.0"])
    @pytest.mark.parametrize("statistics", [False, True])
    def test_bias_activation_and_statistics(self, bias, activation, statistics, dtype):
        a = made(
            (2, 3, 31, 70), 40, 9, [4] * 4, "reflect", dtype, activation=activation, statistics=statistics
        )
        if bias:
            a = a._replace(bias=torch.randn(40, dtype=dtype, device="cuda"))
        out, mean, variance = run(a)
        check_output(a, out)
        if statistics:
            check_statistics(out, mean, variance)
        else:
            assert mean.numel() == variance.numel() == 0

    @pytest.mark.parametrize("dtype", TWO_DTYPES)
    @pytest.mark.parametrize("layout", ["channels_last", "rows and columns skipped", "one image expanded"])
    def test_reads_any_strides(self, layout, dtype):
        a = made((2, 3, 37, 53), 32, 9, [4, 4, 4, 4], "reflect", dtype)
        x = a.input
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "one image expanded":
            x = x[:1].expand(3, 3, 37, 53)
        else:
            larger = torch.full((2, 3, 74, 159), float("nan"), dtype=x.dtype, device="cuda")
            x = larger[:, :, 1::2, 1::3].copy_(x)
        a = a._replace(input=x)
        out, mean, variance = run(a)
        check_output(a, out)
        check_statistics(out, mean, variance)

    @pytest.mark.parametrize("dtype", TWO_DTYPES)
    @pytest.mark.parametrize(("shape", "out_channels", "kernel", "padding", "mode"), CASES)
    def test_writes_nothing_beside_its_output(
        self, shape, out_channels, kernel, padding, mode, dtype, monkeypatch
    ):
        margin, buffers = 65536, []

        def poisoned(shape, like, channels_last, dtype=None):
            n, c, h, w = shape
            elements = margin + n * c * h * w + margin
            buffers.append(torch.full((elements,), float("nan"), dtype=like.dtype, device="cuda"))
            return buffers[-1][margin:-margin].view(n, h, w, c).permute(0, 3, 1, 2)

        monkeypatch.setattr(first_conv, "empty_image", poisoned)
        out = first_conv.conv2d(made(shape, out_channels, kernel, padding, mode, dtype))[0]
        assert out.isfinite().all()
        assert buffers[0][:margin].isnan().all() and buffers[0][-margin:].isnan().all()

    @pytest.mark.parametrize("dtype", TWO_DTYPES)
    def test_constant_picture_has_no_variance(self, dtype):
        a = made((2, 3, 100, 300), 32, 9, [4] * 4, "reflect", dtype)
        a.input.fill_(0.7)
        out, mean, variance = run(a)
        check_output(a, out)
        assert (variance >= 0).all() and (variance <= 1e-8 * (1 + mean.square())).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_mean_of_100_deviations(self, dtype):
        a = made((2, 3, 300, 500), 32, 3, [1] * 4, "reflect", dtype)
        weight = torch.rand(32, 3, 3, 3).to(dtype).cuda()
        # The noise of 27 pixels grows by about sqrt(27), their mean by 27.
        x = (1 + torch.randn(a.input.shape) * 27**0.5 / 100).to(dtype).cuda()
        a = a._replace(input=x, weight=weight)
        out, mean, variance = run(a)
        check_statistics(out, mean, variance)
        assert (mean.abs() > 30 * variance.sqrt()).all()

    def test_forbidden_tf32_is_not_used(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        assert "TF32" in first_conv.refusal(made((1, 3, 37, 53), 32, 9, [4] * 4, "reflect", torch.float32))

    @pytest.mark.parametrize("dtype", TWO_DTYPES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("pixel", [(0, 0), (20, 31), (36, 52)])
    def test_nan_and_infinity_show_up(self, value, pixel, dtype):
        a = made((3, 3, 37, 53), 32, 9, [4] * 4, "reflect", dtype)
        a.input[1, 2][pixel] = value
        out, mean, variance = run(a)
        bad = ~convolution(a, torch.float32).isfinite()
        assert bad.any() and not out[bad].isfinite().any()
        assert not mean[1].isfinite().any() and not variance[1].isfinite().any()
        check_statistics(out[::2], mean[::2], variance[::2])

    @pytest.mark.parametrize("dtype", TWO_DTYPES)
    def test_nan_passes_the_relu(self, dtype):
        a = made((1, 3, 37, 53), 32, 9, [4] * 4, "reflect", dtype, activation="relu")
        a.input[0, 1, 7, 9] = float("nan")
        assert run(a)[0][convolution(a, torch.float32).isnan()].isnan().all()

    @pytest.mark.parametrize("dtype", TWO_DTYPES)
    def test_overflow_is_infinite(self, dtype):
        a = made((1, 3, 37, 53), 32, 9, [4] * 4, "zeros", dtype)
        large = torch.full_like(a.input, torch.finfo(dtype).max / 50)
        a = a._replace(input=large, weight=torch.ones_like(a.weight))
        out, mean, variance = run(a)
        assert out.isposinf().all() and not mean.isfinite().any() and not variance.isfinite().any()

    @pytest.mark.parametrize("dtype", TWO_DTYPES)
    @pytest.mark.parametrize("shape", [(3, 3, 64, 300), (1, 3, 530, 1919)])
    def test_same_bits_on_every_run(self, shape, dtype):
        a = made(shape, 32, 9, [4] * 4, "reflect", dtype)
        first = run(a)
        for _ in range(4):
            assert all(torch.equal(one, other) for one, other in zip(first, run(a), strict=True))

    @pytest.mark.parametrize("dtype", TWO_DTYPES)
    def test_a_changed_weight_is_packed_anew(self, dtype):
        a = made((1, 3, 37, 53), 32, 9, [4] * 4, "reflect", dtype)
        run(a)
        a.weight.neg_()
        check_output(a, run(a)[0])

    @pytest.mark.parametrize("dtype", TWO_DTYPES)
    def test_replays_in_a_graph(self, dtype):
        a = made((2, 3, 37, 300), 32, 9, [4] * 4, "reflect", dtype)
        expected = run(a)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [run(a) for _ in range(3)]
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        for result in results:
            assert all(torch.equal(one, other) for one, other in zip(expected, result, strict=True))
