from itertools import product

import pytest
import torch
from cases import LAYOUTS, picture, relative_error
from torch import nn

from sf_compile.nn import FusedInstanceNorm2d

KINDS = list(product([False, True], [False, True]))
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def distance(out, expected):
    return relative_error(out.detach(), expected.detach())


def pair(channels=6, *, dtype=torch.float32, activation="none", **settings):
    """The fused norm and PyTorch's, with the same random parameters and running statistics."""
    fused = FusedInstanceNorm2d(channels, activation=activation, dtype=dtype, **settings)
    plain = nn.InstanceNorm2d(channels, dtype=dtype, **settings)
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(channels) + 0.5 if "var" in name else torch.randn(channels))
    fused.load_state_dict(plain.state_dict())
    return fused, plain


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("affine", "running"), KINDS)
def test_equals_instance_norm(affine, running, training, layout, dtype):
    fused, plain = pair(affine=affine, track_running_stats=running, dtype=dtype)
    for norm in (fused, plain):
        norm.train(training)
    x = picture((2, 6, 9, 7), dtype, layout)
    with torch.no_grad():
        out = fused(x)
        expected = plain.double()(x.double())
    assert out.dtype == dtype and out.shape == x.shape and out.stride() == x.stride()
    assert distance(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("affine", "running"), KINDS)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_activation_then_residual(with_residual, activation, affine, running, training, layout):
    fused, plain = pair(affine=affine, track_running_stats=running, activation=activation)
    for norm in (fused, plain):
        norm.train(training)
    x = picture((2, 6, 5, 8), torch.float32, layout)
    residual = torch.randn(2, 6, 5, 8) if with_residual else None
    expected = plain(x).relu() if activation == "relu" else plain(x)
    expected = expected if residual is None else expected + residual
    out = fused(x, residual)
    assert distance(out, expected) < 2e-6
    assert out.stride() == x.stride()


@pytest.mark.parametrize(("affine", "running"), KINDS)
def test_the_state_dict_goes_both_ways(affine, running):
    fused, plain = pair(affine=affine, track_running_stats=running)
    assert list(fused.state_dict()) == list(plain.state_dict())
    back = nn.InstanceNorm2d(6, affine=affine, track_running_stats=running)
    assert str(back.load_state_dict(fused.state_dict())) == "<All keys matched successfully>"
    for name, value in plain.state_dict().items():
        assert torch.equal(value, back.state_dict()[name])
    assert isinstance(fused, nn.InstanceNorm2d)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_training_updates_the_running_statistics_as_eager_does(momentum):
    fused, plain = pair(affine=True, track_running_stats=True, momentum=momentum, activation="relu")
    for _ in range(3):
        x = torch.randn(3, 6, 4, 5) * 3 + 1
        out = fused(x, x)
        assert distance(out, plain(x).relu() + x) < 2e-6
    for name, value in plain.state_dict().items():
        assert torch.equal(value, fused.state_dict()[name]), name
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    fused.eval()(x)
    assert all(torch.equal(value, fused.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("shape", [(2, 6, 1, 1), (6, 1, 1)])
@pytest.mark.parametrize("running", [False, True])
def test_a_single_pixel_is_refused_as_eager_refuses_it(running, shape):
    fused, plain = pair(track_running_stats=running)
    x = torch.randn(shape)
    with pytest.raises(ValueError) as expected:
        plain(x)
    with pytest.raises(ValueError) as error:
        fused(x)
    assert str(error.value) == str(expected.value)


def test_a_single_pixel_is_fine_by_running_statistics():
    fused, plain = pair(track_running_stats=True)
    x = torch.randn(2, 6, 1, 1)
    assert distance(fused.eval()(x), plain.eval()(x)) < 2e-6


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("running", [False, True])
def test_a_picture_without_a_batch(running, activation):
    fused, plain = pair(affine=True, track_running_stats=running, activation=activation)
    x, residual = torch.randn(6, 8, 5), torch.randn(6, 8, 5)
    for training in (True, False):
        for norm in (fused, plain):
            norm.train(training)
        for addition in (None, residual):  # one call each: in training, every call moves the statistics
            expected = plain(x).relu() if activation == "relu" else plain(x)
            expected = expected if addition is None else expected + addition
            assert distance(fused(x, addition), expected) < 2e-6


@pytest.mark.parametrize("shape", [(6, 4), (1, 2, 6, 4, 4)])
def test_other_ranks_are_refused_as_eager_refuses_them(shape):
    fused, plain = pair()
    with pytest.raises(ValueError) as expected:
        plain(torch.randn(shape))
    with pytest.raises(ValueError) as error:
        fused(torch.randn(shape))
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("channels", [5, 7])
@pytest.mark.parametrize("settings", [{}, {"affine": True}, {"affine": True, "track_running_stats": True}])
def test_a_wrong_channel_count_gets_eagers_answer(settings, channels):
    fused, plain = pair(**settings)
    for norm in (fused, plain):
        norm.eval()
    x = torch.randn(2, channels, 4, 4)
    if settings:
        for norm in (fused, plain):
            with pytest.raises((ValueError, RuntimeError)):
                norm(x)
    else:
        with pytest.warns(UserWarning, match=r"input's size at dim=1 does not match num_features"):
            expected = plain(x)
        assert distance(fused(x), expected) < 2e-6


@pytest.mark.parametrize("residual", [torch.randn(2, 6, 4, 1), torch.randn(2, 6, 4, 4).double()])
def test_a_residual_of_another_shape_or_dtype_is_refused(residual):
    fused, _ = pair()
    with pytest.raises(RuntimeError, match="residual"):
        fused(torch.randn(2, 6, 4, 4), residual)


@pytest.mark.parametrize("activation", ["Relu", "relu(1.0)", "", None])
def test_an_unknown_activation_is_refused(activation):
    with pytest.raises(ValueError, match=r"activation must be (one of none, .*|relu of 0 numbers); got"):
        FusedInstanceNorm2d(3, activation=activation)


def test_extra_repr_names_the_activation():
    plain = nn.InstanceNorm2d(3, affine=True)
    fused = FusedInstanceNorm2d(3, affine=True, activation="relu")
    assert fused.extra_repr() == plain.extra_repr() + ", activation='relu'"
    assert repr(fused).startswith("FusedInstanceNorm2d(3, ")


@pytest.mark.parametrize(("affine", "running"), KINDS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_equal_eagers(affine, running, training):
    fused, plain = pair(
        affine=affine, track_running_stats=running, activation="relu", dtype=torch.float64
    )
    for norm in (fused, plain):
        norm.train(training)
    leaves = [torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weight = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    got = torch.autograd.grad((fused(*leaves) * weight).sum(), [*leaves, *fused.parameters()])
    expected = plain(leaves[0]).relu() + leaves[1]
    expected = torch.autograd.grad((expected * weight).sum(), [*leaves, *plain.parameters()])
    assert len(got) == len(expected)
    assert all(distance(a, b) < 1e-9 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_torch_compile(backend):
    fused, plain = pair(affine=True, activation="relu")
    x = torch.randn(2, 6, 8, 8)
    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    assert distance(compiled(x), plain(x).relu()) < 2e-6
