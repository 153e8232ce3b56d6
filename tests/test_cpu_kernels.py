"""The C++ kernels of csrc/cpu, through the ops: against float64, eager's own error, and the reference."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import IDS, LAYOUTS, SHAPES, picture, relative_error
from torch import Tensor

from sf_compile import ops
from sf_compile.activations import parse
from sf_compile.cpu import building, convolution, kernels
from sf_compile.models import TransformerNet
from sf_compile.ops import reference
from sf_compile.ops.conv2d import composed
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.normalize import Norm

ROOT = Path(__file__).parents[1]
ACTIVATIONS = (
    "none", "relu", "leaky_relu(0.2)", "hardtanh(0.0, 6.0)", "clamp(-0.5, inf)", "tanh * 150.0 + 127.5",
    "sigmoid", "silu", "gelu", "gelu_tanh", "elu(0.7)", "relu * 0.5 + 1.0",
)  # fmt: skip
# In bfloat16 sums are as good as eager's; single numbers are rounded to 2^-9 either way.
DTYPES = (torch.float32, torch.bfloat16)
built = pytest.mark.skipif(building.missing() is not None, reason=str(building.missing()))


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "take", lambda x: False)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not looked for the kernels yet, and an empty cache folder."""
    monkeypatch.setattr(building, "_known", [])
    monkeypatch.setenv("STYLEFORGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(building.VARIABLE, raising=False)
    return tmp_path / "cache"


def strided(x: Tensor, how: str) -> Tensor:
    """``x`` with other strides: of a larger picture, or with its axes in an order of their own."""
    n, c, h, w = x.shape
    if how in LAYOUTS:
        return x.contiguous(memory_format=LAYOUTS[how])
    if how == "crop":
        larger = x.new_full((n, c, h + 3, w + 2), torch.nan)
        larger[:, :, 2 : h + 2, 1 : w + 1] = x
        return larger[:, :, 2 : h + 2, 1 : w + 1]
    if how == "channels":
        larger = x.new_full((n, c + 3, h, w), torch.nan).contiguous(memory_format=torch.channels_last)
        larger[:, 2 : c + 2] = x
        return larger[:, 2 : c + 2]
    return x.permute(0, 2, 3, 1).transpose(1, 2).contiguous().transpose(1, 2).permute(0, 3, 1, 2)


def exact_finish(x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    x64 = x.double()
    mean, variance, weight, bias = (None if v is None else v.double() for v in norm[:4])
    z = reference.normalize(
        x64,
        mean,
        variance,
        weight,
        bias,
        norm.eps,
        norm.activation,
        None if residual is None else residual.double(),
    )
    assert z.dtype == torch.float64
    return z


def norm_of(x: Tensor, per_image: bool, activation: str = "relu") -> Norm:
    mean, variance = reference.statistics(x)
    shape = x.shape[:2] if per_image else x.shape[1:2]
    return Norm(mean, variance, torch.rand(shape) + 0.5, torch.randn(shape), 1e-5, activation)


@built
@pytest.mark.parametrize("row", SHAPES, ids=IDS)
@pytest.mark.parametrize("how", [*LAYOUTS, "crop", "channels", "mixed"])
def test_statistics_of_any_strides(row, how):
    for dtype, mean in itertools.product(DTYPES, (0.0, 100.0)):
        x = strided(picture(row.shape, dtype, "contiguous", mean=mean), how)
        exact = torch.var_mean(x.double(), (2, 3), correction=0)
        got_mean, got_variance = kernels.statistics(x)
        assert float((got_mean - exact[1]).abs().max()) < 1e-7 * (1 + mean)
        assert relative_error(got_variance, exact[0]) < 3e-6
        assert got_mean.is_contiguous() and got_variance.dtype == torch.float32


@built
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 32, 37, 53), (1, 3, 300, 501), (1, 1, 1, 1)])
def test_a_constant_picture_has_no_variance_and_its_own_mean(shape, layout):
    for value in (0.0, 0.1, -1234.567, 3e4):
        x = torch.full(shape, value).contiguous(memory_format=LAYOUTS[layout])
        mean, variance = kernels.statistics(x)
        assert torch.equal(mean, x[:, :, 0, 0]) and not variance.any()


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_do_not_depend_on_the_number_of_threads(layout):
    x = picture((2, 24, 65, 97), torch.float32, layout, mean=10.0)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.stack(kernels.statistics(x)))
            found.append(torch.stack(kernels.statistics(x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


@built
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_finish_of_every_activation_is_the_references(layout, activation):
    for dtype, residual, per_image in itertools.product(DTYPES, (False, True), (False, True)):
        x = picture((2, 11, 7, 13), dtype, layout)
        other = picture(x.shape, dtype, layout) if residual else None
        norm = norm_of(x, per_image, activation)
        exact = exact_finish(x, norm, other)
        got, _ = kernels.finish(x, norm, other, layout == "channels_last")
        plain = reference.normalize(x, *norm, other)
        assert got.dtype == dtype and got.is_contiguous(memory_format=LAYOUTS[layout])
        assert relative_error(got, exact) <= 1.25 * relative_error(plain, exact) + 1e-7


@built
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_are_pytorchs(activation):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-30, 88.0, -88.0, 3.0]).view(1, 1, 3, 3)
    x = x.repeat(1, 9, 1, 1)
    norm = Norm(None, None, None, None, 0.0, activation)
    for layout in LAYOUTS:
        got, _ = kernels.finish(x, norm, None, layout == "channels_last")
        with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's gelu(inf) is NaN with AVX-512
            expected = reference.normalize(x, *norm, None)
        torch.testing.assert_close(got, expected, equal_nan=True)
    assert str(parse(activation)) == activation


@built
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("how", [*LAYOUTS, "crop", "channels", "mixed"])
def test_upsampling_and_padding_move_finished_pixels(how, mode):
    for dtype, upsample, padding, last in itertools.product(
        DTYPES, (1, 2, 3), ([0, 0, 0, 0], [1, 1, 1, 1], [3, 0, 1, 4]), (False, True)
    ):
        for shape in ((2, 10, 5, 5), (1, 3, 6, 19), (3, 16, 5, 9)):
            x = strided(picture(shape, dtype, "contiguous"), how)
            residual = strided(picture(shape, dtype, "contiguous"), "mixed" if how == "crop" else how)
            norm = norm_of(x, True)
            z, _ = kernels.finish(x, norm, residual, last)
            got, kept = kernels.finish(
                x, norm, residual, last, upsample=upsample, padding=padding, padding_mode=mode, keep=True
            )
            assert torch.equal(got, reference.moved(z, upsample, padding, mode))
            assert kept is not None and torch.equal(kept, z) and kept.stride() == z.stride()
            assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


CONVOLUTIONS = [
    # channels, out, kernel, stride, upsample, padding, mode, out activation, statistics
    pytest.param(3, 32, 9, 1, 1, [4] * 4, "reflect", "none", True, id="first"),
    pytest.param(32, 40, 3, 2, 1, [1] * 4, "reflect", "none", True, id="down"),
    pytest.param(24, 24, 3, 1, 1, [1] * 4, "reflect", "none", True, id="residual"),
    pytest.param(32, 48, 3, 1, 1, [1] * 4, "reflect", "none", True, id="winograd"),
    pytest.param(48, 32, 3, 1, 1, [2, 0, 0, 1], "zeros", "silu", False, id="winograd-zeros"),
    pytest.param(64, 64, 3, 1, 3, [1] * 4, "replicate", "none", True, id="winograd-upsampled"),
    pytest.param(16, 8, 3, 1, 2, [1] * 4, "reflect", "none", True, id="subpixel-reflect"),
    pytest.param(16, 5, 3, 1, 2, [1] * 4, "zeros", "relu", True, id="subpixel-zeros"),
    pytest.param(6, 3, 3, 1, 2, [1] * 4, "replicate", "tanh", False, id="subpixel-replicate"),
    pytest.param(16, 8, 3, 1, 2, [1, 1, 1, 0], "reflect", "none", True, id="upsampled, uneven pad"),
    pytest.param(16, 8, 5, 1, 2, [2] * 4, "reflect", "none", True, id="upsampled, 5x5"),
    pytest.param(32, 3, 9, 1, 1, [4] * 4, "reflect", "none", False, id="last"),
    pytest.param(20, 3, 7, 1, 1, [3] * 4, "reflect", "tanh * 150.0 + 127.5", False, id="last-tanh"),
    pytest.param(20, 1, 5, 1, 1, [2, 1, 0, 2], "zeros", "sigmoid", True, id="last-one-channel"),
    pytest.param(8, 16, 1, 1, 3, [0] * 4, "zeros", "leaky_relu(0.2)", True, id="1x1"),
    pytest.param(8, 3, 1, 1, 1, [0] * 4, "zeros", "tanh", False, id="three-channels"),
]


def compare(a: Arguments, exact_of: Arguments, floor: float) -> None:
    """Every result of the op at least as close to float64 as 1.25 x the reference's, and in its strides."""
    got, plain, exact = ops.conv2d(*a), composed(a), composed(exact_of)
    for mine, theirs, true in zip(got, plain, exact, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        assert relative_error(mine, true) <= 1.25 * relative_error(theirs, true) + floor


def doubled(a: Arguments) -> Arguments:
    return Arguments(*(v.double() if isinstance(v, Tensor) else v for v in a))


@built
@pytest.mark.parametrize("shape", [(1, 37, 53), (2, 5, 5), (3, 12, 8)], ids=str)
@pytest.mark.parametrize(
    ("channels", "out", "kernel", "stride", "upsample", "padding", "mode", "activation", "statistics"),
    CONVOLUTIONS,
)
def test_conv2d_is_as_close_to_float64_as_the_reference(
    channels, out, kernel, stride, upsample, padding, mode, activation, statistics, shape
):
    n, h, w = shape
    for dtype, last, how in itertools.product(DTYPES, (False, True), (*LAYOUTS, "crop")):
        x = strided(picture((n, channels, h, w), dtype, "contiguous"), how)
        residual = picture(x.shape, dtype, how if how in LAYOUTS else "contiguous")
        weight = torch.nn.Parameter(
            (torch.randn(out, channels, kernel, kernel) / kernel / channels**0.5).to(dtype), False
        )
        bias = None if statistics else torch.randn(out).to(dtype)
        moves = (upsample, padding, mode, [stride] * 2, activation, statistics)
        for normed in (False, True):
            norm = norm_of(x, n == 2) if normed else Norm(None, None, None, None, 1e-5, "none")
            other = residual if normed and n < 3 else None
            a = Arguments(x, weight, bias, *norm, other, *moves, normed, last)
            compare(a, doubled(a), 2e-6 if dtype == torch.float32 else 2e-3)


@built
@pytest.mark.parametrize("last", [False, True])
def test_a_transposed_convolution_is_finished_and_measured(last):
    for dtype in DTYPES:
        x = picture((2, 12, 9, 7), dtype, "channels_last")
        weight = (torch.randn(12, 6, 3, 3) / 10).to(dtype)
        a = Arguments(
            x,
            weight,
            None,
            *norm_of(x, False),
            None,
            1,
            [1, 0, 1, 0],
            "zeros",
            [2, 2],
            "none",
            True,
            True,
            last,
            True,
        )
        compare(a, doubled(a), 2e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(
    ("upsample", "size", "kept", "made_anew"),
    [
        (1, 15, kernels.DIRECT, kernels.DIRECT), (1, 16, kernels.WINOGRAD, kernels.DIRECT),
        (1, 127, kernels.WINOGRAD, kernels.DIRECT), (1, 128, kernels.WINOGRAD, kernels.WINOGRAD),
        (2, 8, kernels.SUBPIXEL, kernels.DIRECT), (2, 126, kernels.SUBPIXEL, kernels.DIRECT),
        (2, 128, kernels.SUBPIXEL, kernels.SUBPIXEL),
    ],
)  # fmt: skip
def test_weights_that_every_call_makes_anew_take_a_form_where_it_pays(
    upsample, size, kept, made_anew, monkeypatch
):
    monkeypatch.setattr(convolution, "is_winograd", lambda *_: True)  # whatever this CPU's vectors
    weight = torch.randn(32, 32, 3, 3)
    with torch.inference_mode():
        unversioned = torch.nn.Parameter(weight.clone(), False)
    x = torch.empty(1, 32, size // upsample, size // upsample)
    moves = (upsample, [1] * 4, "reflect", [1, 1], "none", True)
    for each, form in ((torch.nn.Parameter(weight), kept), (weight, made_anew), (unversioned, made_anew)):
        a = Arguments(x, each, None, None, None, None, None, 1e-5, "none", None, *moves, False, True)
        assert convolution.form_of(a, torch.float32) == form


@built
def test_a_changed_weight_is_packed_anew():
    x = picture((1, 16, 12, 12), torch.float32, "channels_last")
    for out, kernel, upsample in ((8, 3, 2), (3, 9, 1), (8, 3, 1)):
        weight = torch.nn.Parameter(torch.randn(out, 16, kernel, kernel), False)
        nothing = Norm(None, None, None, None, 1e-5, "none")
        a = Arguments(
            x,
            weight,
            None,
            *nothing,
            None,
            upsample,
            [kernel // 2] * 4,
            "reflect",
            [1, 1],
            "none",
            False,
            False,
            True,
        )
        for _ in range(2):
            torch.testing.assert_close(ops.conv2d(*a)[0], composed(a)[0], atol=1e-3, rtol=1e-4)
            with torch.no_grad():
                weight.mul_(-2)


@built
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_instance_norm_of_a_picture_far_from_zero(mean):
    for row, layout in itertools.product(SHAPES, LAYOUTS):
        x = picture(row.shape, torch.float32, layout, mean=mean)
        got = ops.instance_norm(x, None, None, 1e-5, "none", None, layout == "channels_last")
        if x.shape[2] * x.shape[3] > 1:
            exact = F.instance_norm(x.double())
            assert relative_error(got, exact) <= 1.25 * relative_error(F.instance_norm(x), exact) + 1e-7
        else:
            assert not got.any()


@built
def test_gradients_are_the_references(monkeypatch):
    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        x = picture((2, 8, 9, 7), torch.float32, "channels_last").requires_grad_()
        weight = torch.nn.Parameter(torch.randn(4, 8, 3, 3))
        vectors = [v.requires_grad_() for v in norm_of(x.detach(), True)[:4]]
        out = ops.conv2d(
            x,
            weight,
            None,
            *vectors,
            1e-5,
            "relu",
            None,
            2,
            [1] * 4,
            "reflect",
            [1, 1],
            "tanh",
            True,
            True,
            True,
        )
        return list(
            torch.autograd.grad(sum((o * o.detach().cos()).sum() for o in out), [x, weight, *vectors])
        )

    ours = gradients()
    without_kernels(monkeypatch)
    for mine, theirs in zip(ours, gradients(), strict=True):
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_is_as_close_to_float64_as_eager(dtype):
    from sf_compile.backend import styleforge

    model = TransformerNet(width=16, blocks=2).eval().to(dtype)
    fused = torch.compile(model, backend=styleforge)
    with torch.no_grad():
        for shape in ((1, 3, 37, 53), (2, 3, 64, 48)):
            x = (torch.rand(shape) * 255).to(dtype)
            exact = TransformerNet(width=16, blocks=2).eval().double()
            exact.load_state_dict(model.state_dict())
            true = exact(x.double())
            eager, got = model(x), fused(x)
            assert (got.dtype, got.stride()) == (eager.dtype, eager.stride())
            assert relative_error(got, true) <= 1.25 * relative_error(eager, true)
            assert torch.equal(got, fused(x))


def test_other_dtypes_and_empty_pictures_are_the_references():
    for x in (torch.randn(1, 2, 3, 3).double(), torch.randn(1, 2, 3, 3).half(), torch.randn(0, 2, 3, 3)):
        assert not kernels.take(x)


@built
def test_bfloat16_is_convolved_in_bfloat16_where_the_cpu_can(monkeypatch):
    monkeypatch.setattr(convolution, "multiplies_bfloat16", lambda: True)
    x = picture((1, 16, 9, 7), torch.bfloat16, "channels_last")
    weight = (torch.randn(8, 16, 3, 3) / 12).bfloat16()
    for activation, upsample in (("none", 1), ("tanh", 2)):
        a = Arguments(
            x,
            weight,
            None,
            *norm_of(x, False),
            None,
            upsample,
            [1] * 4,
            "reflect",
            [1, 1],
            activation,
            True,
            True,
            True,
        )
        compare(a, doubled(a), 2e-3)


@pytest.mark.parametrize("why", ["switch", "compiler", "ninja", "broken compiler"])
def test_without_a_compiler_the_reference_runs_and_says_so_once(fresh, monkeypatch, caplog, tmp_path, why):
    if why == "switch":
        monkeypatch.setenv(building.VARIABLE, "0")
    elif why == "compiler":
        monkeypatch.setattr(building, "compiler", lambda: None)
    elif why == "ninja":
        monkeypatch.setattr(building, "_ninja_folder", lambda: None)
    else:
        if building.missing() is not None:
            pytest.skip(str(building.missing()))
        broken = tmp_path / "broken-c++"
        broken.write_text(
            '#!/bin/sh\ncase "$*" in *-dumpfullversion*|*--version*|*-v*) exec c++ "$@";; esac\n'
            "echo 'error: no room' >&2; exit 1\n"
        )
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
    x = torch.randn(1, 4, 6, 6)
    with caplog.at_level(logging.INFO, logger="sf_compile"):
        for _ in range(3):
            got = ops.instance_norm(x, None, None, 1e-5)
    assert torch.equal(got, reference.normalize(x, *reference.statistics(x), None, None, 1e-5, "none", None))
    (record,) = [r for r in caplog.records if "PyTorch's own" in r.getMessage()]
    assert "Fix: " in record.getMessage()
    assert record.levelno == (logging.INFO if why == "switch" else logging.WARNING)
    assert not list(fresh.glob("cpu/*.so")) and not list(fresh.glob("cpu/.build-*"))


PROCESS = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO)
from sf_compile.cpu import building
library = building.library()
assert library is not None
from sf_compile import ops
x = torch.randn(1, 8, 9, 9)
torch.testing.assert_close(ops.instance_norm(x, None, None, 1e-5), torch.nn.functional.instance_norm(x))
"""


def start(cache: Path) -> subprocess.Popen[str]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "STYLEFORGE_CACHE_DIR": str(cache)}
    return subprocess.Popen([sys.executable, "-c", PROCESS], env=settings, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error
    return error


@built
def test_two_processes_build_one_library_and_a_damaged_one_is_built_again(tmp_path):
    """Kept in one test: every build takes seconds."""
    both = [finished(process) for process in [start(tmp_path), start(tmp_path)]]
    assert sum("Built the CPU kernels in" in error for error in both) == 1
    (library,) = tmp_path.glob("cpu/*.so")
    assert not list(tmp_path.glob("cpu/.build-*"))
    data = library.read_bytes()
    library.write_bytes(data[: len(data) // 2])
    error = finished(start(tmp_path))
    assert "damaged" in error and "Built the CPU kernels in" in error
    assert "Built" not in finished(start(tmp_path))
    assert building._load(library) is not None


def test_an_altered_library_is_not_loaded(fresh, caplog):
    path = building.place()
    assert path is not None and path.parent.parent == fresh
    assert building._load(path) is None  # not there
    path.parent.mkdir(parents=True)
    for content in (b"", b"\x7fELF" + bytes(100), building._MAGIC + bytes(32)):
        path.write_bytes(content)
        assert building._load(path) is None
    assert sum("damaged" in record.getMessage() for record in caplog.records) == 3


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
@built
def test_an_unwritable_folder_is_done_without(fresh, caplog):
    fresh.mkdir(mode=0o500)
    assert building.load_or_build() is not None
    assert "STYLEFORGE_CACHE_DIR" in caplog.text


def test_the_digest_follows_flags_version_and_sources(monkeypatch, tmp_path):
    first = building.digest()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    second = building.digest()
    monkeypatch.setattr(building, "flags", lambda: ["-O1"])
    third = building.digest()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "a.h").write_text("// another")
    monkeypatch.setattr(building, "source_directory", lambda: tmp_path)
    assert len({first, second, third, building.digest()}) == 4
