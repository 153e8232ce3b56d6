"""Transposed convolutions by csrc/halo_conv.cu on compute capability 9.0, against float64 and eager."""

from __future__ import annotations

import pytest
import torch
from cases import relative_error
from halo_layers import Layer, check, check_margins, compile_all, equal, fused, made, run
from torch import nn

from sf_compile.cuda import convolution, halo_conv
from sf_compile.cuda.loader import loaded

NAN = float("nan")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled")]

THREE = Layer(128, 64, (3, 3), (1, 0, 1, 0), "zeros", stride=2, transposed=True)
FOUR = THREE._replace(kernel=(4, 4), padding=(1, 1, 1, 1))
SMALL = THREE._replace(channels=64, out_channels=32)
TINY = THREE._replace(channels=16, out_channels=8, keep=True)
SKIP = FOUR._replace(channels=64, out_channels=64, relu=False, residual=True, keep=True)
BARE = SMALL._replace(norm="none", relu=False)
GENERAL = Layer(
    24, 40, (3, 4), (1, 1, 0, 1), "zeros", 2, norm="running", bias=True, output_relu=True, statistics=False,
    transposed=True,
)  # fmt: skip

CASES = (
    (THREE, (1, 19, 27), "height and width odd"),
    (THREE, (1, 5, 6), "a picture smaller than a tile"),
    (THREE, (2, 8, 32), "exactly a tile"),
    (THREE, (3, 9, 33), "three images, a pixel more than a tile each way"),
    (THREE, (1, 67, 121), "several tiles a block, ragged at both ends"),
    (FOUR, (1, 7, 31), "4x4, a pixel less than a tile each way"),
    (FOUR, (3, 16, 64), "three images of whole tiles"),
    (FOUR, (1, 1, 1), "one pixel: nothing but border"),
    (THREE._replace(padding=(0, 1, 0, 1)), (1, 19, 27), "TensorFlow's, cropped at the end"),
    (THREE._replace(kernel=(2, 2), padding=(0, 0, 0, 0)), (2, 19, 27), "2x2: a pixel becomes four"),
    (THREE._replace(channels=256, out_channels=128, residual=True), (1, 19, 27), "a pass for the residual"),
    (SMALL, (1, 19, 40), "row blocks shared by two parities"),
    (SMALL._replace(kernel=(4, 4), padding=(1, 1, 1, 1)), (3, 8, 33), "their windows, 4x4, three images"),
    (TINY, (1, 9, 9), "a row block shared by four parities, and z is kept"),
    (TINY._replace(kernel=(4, 4), padding=(1, 1, 1, 1), out_channels=16), (3, 17, 33), "the same, 4x4"),
    (SKIP, (1, 19, 27), "the residual beside the input"),
    (BARE, (3, 21, 36), "no norm at all"),
    (GENERAL, (3, 15, 25), "3x4, uneven, 24 -> 40, running statistics, bias, ReLU"),
)
BFLOAT16 = (THREE, FOUR, SMALL)
IDS = [why.replace(":", "").replace(" ", "-") for *_, why in CASES]


@pytest.fixture(scope="module")
def compiled(hopper_kernels):
    compile_all(
        [(layer, torch.float16) for layer, _, _ in CASES] + [(layer, torch.bfloat16) for layer in BFLOAT16]
    )


@pytest.mark.parametrize(("layer", "size", "why"), CASES, ids=IDS)
def test_against_float64(layer, size, why):
    check(made(layer, size))


@pytest.mark.parametrize("size", [(1, 19, 27), (3, 9, 33)])
@pytest.mark.parametrize("layer", BFLOAT16, ids=["3x3", "4x4", "shared"])
def test_bfloat16(layer, size):
    check(made(layer, size, torch.bfloat16))


def test_the_fused_kernel_is_what_runs():
    for layer in (THREE, FOUR, SMALL):
        a = made(layer, (1, 16, 32))
        assert convolution.choice(a) == (halo_conv, False, False)
        run(a)
        constants = tuple(sorted(halo_conv._variant(fused(a)).constants().items()))
        assert any(k.key.source == halo_conv.SOURCE and k.key.constants == constants for k in loaded())


@pytest.mark.parametrize("layer", [THREE, FOUR, SMALL, TINY, SKIP])
@pytest.mark.parametrize("size", [(1, 5, 6), (2, 19, 27), (1, 16, 64)])
def test_writes_nothing_beside_its_outputs(layer, size, monkeypatch):
    a = fused(made(layer, size))
    check_margins(a, run(a), monkeypatch)


@pytest.mark.parametrize("layer", [THREE, SMALL])
def test_same_bits_on_every_run(layer):
    a = made(layer, (3, 37, 53))
    first = run(a)
    assert all(equal(run(a), first) for _ in range(10))


def test_kernels_of_several_paddings_keep_packed_weights_apart():
    """One parameter read by two convolutions that pack it differently."""
    weight = nn.Parameter(made(THREE, (1, 4, 4)).weight, requires_grad=False)
    ours = []
    for padding in ((1, 0, 1, 0), (0, 1, 0, 1), (1, 0, 1, 0)):
        a = made(THREE._replace(padding=padding), (1, 19, 27))._replace(weight=weight)
        ours.append(check(a))
    assert ours[0][0].shape == ours[1][0].shape


def test_the_fake_kernel_describes_what_is_returned():
    results = torch.library.opcheck(
        torch.ops.styleforge.conv2d.default,
        tuple(made(THREE, (2, 19, 27))),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(results.values()) == {"SUCCESS"}


class Decoder(nn.Module):
    """Down, and up again by transposed convolutions: one exact, one cropped as TensorFlow's are."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(64, 128, 3, 2, 1)
        self.up1 = nn.ConvTranspose2d(128, 64, 3, 2, 1, 1)
        self.up2 = nn.ConvTranspose2d(64, 32, 3, 2)
        self.norms = nn.ModuleList(nn.InstanceNorm2d(c, affine=True) for c in (128, 64, 32))

    def forward(self, x):
        x = self.norms[0](self.down(x)).relu()
        x = self.norms[1](self.up1(x)).relu()
        return self.norms[2](self.up2(x)[:, :, :-1, :-1]).relu()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_decoder_is_as_close_to_float64_as_eager_s(dtype):
    model = Decoder().cuda().eval()
    x = torch.randn(2, 64, 38, 50, device="cuda")
    with torch.inference_mode():
        exact = model.double()(x.double())
        model.to(dtype)
        eager = model(x.to(dtype))
        ours = torch.compile(model, backend="styleforge", fullgraph=True)
        for _ in range(3):  # one by one, recorded, replayed
            out = ours(x.to(dtype))
            assert out.stride() == eager.stride()
            allowed = 1.25 * relative_error(eager, exact) + torch.finfo(dtype).eps / 8
            assert relative_error(out, exact) <= allowed
