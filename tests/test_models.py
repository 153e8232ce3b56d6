import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sf_compile import models
from sf_compile.models import builtin, tf_transform_net

SHARED = Path(__file__).parents[2] / "shared"
TRANSFORMER_FILES = ("candy_nc16", "mosaic_nc16", "rain_princess_nc16", "udnie_nc16", "mosaic_nc8")
TENSORFLOW_FILES = ("lengstrom_udnie", "lengstrom_rain_princess", "lengstrom_wave")
KINDS = (models.TransformerNet, models.TensorFlowTransformNet, models.MultiStyleNet)
SIZES = [(5, 5), (8, 8), (9, 14), (16, 7), (33, 18), (31, 64)]


def small(kind):
    torch.manual_seed(0)
    if kind is models.MultiStyleNet:
        return kind(channels=4, blocks=1).eval()
    return kind(width=2, blocks=1).eval()


def weights(stem):
    path = next(iter((SHARED / "weights").glob(f"{stem}.pt*")), None)
    if path is None:
        pytest.skip(f"the trained weights {stem} are not on this machine")
    return path


def photo(side):
    path = SHARED / "images" / "amber.jpg"
    if not path.exists():
        pytest.skip("the test photo amber.jpg is not on this machine")
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB").resize((side, side)))
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float().contiguous()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_output_sides_are_the_input_sides_rounded_up_to_a_multiple(kind, size):
    height, width = size
    with torch.inference_mode():
        y = small(kind)(torch.rand(2, 3, height, width))
    multiple = models.SIDE_MULTIPLE
    assert y.shape == (2, 3, -(-height // multiple) * multiple, -(-width // multiple) * multiple)
    assert torch.isfinite(y).all()


def test_min_side_is_the_smallest_that_the_reflection_pads_take():
    net = small(models.TransformerNet)
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        net(torch.rand(1, 3, models.MIN_SIDE - 1, 16))


@pytest.mark.parametrize("kind", [models.TransformerNet, models.TensorFlowTransformNet])
@pytest.mark.parametrize("arguments", [{"width": 0}, {"blocks": -1}])
def test_impossible_widths_and_depths_are_refused(kind, arguments):
    with pytest.raises(ValueError, match="width >= 1 and blocks >= 0"):
        kind(**arguments)


def test_transformer_net_has_the_public_parameter_names_and_shapes():
    shapes = {key: tuple(value.shape) for key, value in models.TransformerNet(8, 2).state_dict().items()}
    convolutions = {
        "conv1": (8, 3, 9, 9), "conv2": (16, 8, 3, 3), "conv3": (32, 16, 3, 3),
        "res1.conv1": (32, 32, 3, 3), "res1.conv2": (32, 32, 3, 3),
        "res2.conv1": (32, 32, 3, 3), "res2.conv2": (32, 32, 3, 3),
        "deconv1": (16, 32, 3, 3), "deconv2": (8, 16, 3, 3), "deconv3": (3, 8, 9, 9),
    }  # fmt: skip
    norms = {"in1": 8, "in2": 16, "in3": 32, "res1.in1": 32, "res1.in2": 32, "res2.in1": 32, "res2.in2": 32,
             "in4": 16, "in5": 8}  # fmt: skip
    expected = {}
    for name, shape in convolutions.items():
        expected |= {f"{name}.conv2d.weight": shape, f"{name}.conv2d.bias": shape[:1]}
    for name, channels in norms.items():
        expected |= {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
    assert shapes == expected


def test_transformer_net_computes_the_published_network():
    net = small(models.TransformerNet).double()
    state = {key: torch.randn_like(value) for key, value in net.state_dict().items()}
    net.load_state_dict(state)

    def conv(x, name, stride=1):
        weight = state[f"{name}.conv2d.weight"]
        pad = weight.shape[-1] // 2
        return F.conv2d(F.pad(x, (pad,) * 4, "reflect"), weight, state[f"{name}.conv2d.bias"], stride)

    def norm(x, name):
        mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
        scale, shift = (state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def upsample(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    x = torch.rand(2, 3, 13, 18, dtype=torch.float64) * 255
    y = norm(conv(x, "conv1"), "in1").relu()
    y = norm(conv(y, "conv2", 2), "in2").relu()
    y = norm(conv(y, "conv3", 2), "in3").relu()
    y = y + norm(conv(norm(conv(y, "res1.conv1"), "res1.in1").relu(), "res1.conv2"), "res1.in2")
    y = norm(conv(upsample(y), "deconv1"), "in4").relu()
    y = conv(norm(conv(upsample(y), "deconv2"), "in5").relu(), "deconv3")
    torch.testing.assert_close(net(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (8, 3, 2, (0, 1)),  # even: the odd zero goes after
        (7, 3, 2, (1, 1)),
        (1, 3, 2, (1, 1)),
        (8, 9, 1, (4, 4)),
        (8, 2, 1, (0, 1)),  # even kernel
        (8, 1, 2, (0, 0)),  # stride past the kernel: nothing to add
    ],
)
def test_same_padding_follows_tensorflow(size, kernel, stride, expected):
    assert tf_transform_net.same_padding(size, kernel, stride) == expected


def test_transposed_convolution_is_the_gradient_of_a_same_convolution():
    layer = tf_transform_net.TransposedConvNorm(2, 3).double()
    picture = torch.randn(1, 3, 10, 6, dtype=torch.float64, requires_grad=True)
    small_map = torch.randn(1, 2, 5, 3, dtype=torch.float64)
    same = F.conv2d(F.pad(picture, (0, 1, 0, 1)), layer.conv.weight, stride=2)
    (expected,) = torch.autograd.grad(same, picture, small_map)
    torch.testing.assert_close(layer(small_map), layer.norm(expected))


@pytest.mark.parametrize("stem", TRANSFORMER_FILES)
def test_public_checkpoints_load_strictly(stem):
    state = torch.load(weights(stem), weights_only=True)
    width = 8 if stem.endswith("nc8") else 16
    result = models.TransformerNet(width=width).load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys


def edges(x):
    grey = x.mean(1)
    return torch.hypot(grey[:, 1:, :-1] - grey[:, :-1, :-1], grey[:, :-1, 1:] - grey[:, :-1, :-1]).flatten()


@pytest.mark.parametrize("stem", TRANSFORMER_FILES + TENSORFLOW_FILES)
def test_trained_networks_repaint_the_photo_and_keep_its_drawing(stem):
    x = photo(192)
    with torch.inference_mode():
        y = models.load_checkpoint(weights(stem))(x)
    outside = ((y < 0) | (y > 255)).float().mean().item()
    drawing = torch.corrcoef(torch.stack([edges(x), edges(y.clamp(0, 255))]))[0, 1].item()
    repainted = (y.clamp(0, 255) - x).abs().mean().item()
    # Seen: 0.002 to 0.039, 0.26 to 0.86, 28 to 59. Without the norms all of the picture is outside;
    # without the activations 0.034 to 0.17 is.
    assert outside < 0.045
    assert drawing > 0.2
    assert repainted > 20


def test_builtin_styles_are_26_distinct_names():
    names = builtin.builtin_styles()
    assert len(set(names)) == 26
    assert names[19] == "multistyle-19"


@pytest.mark.parametrize("number", [0, 19, 25])
def test_builtin_style_equals_the_original_file_in_onnxruntime(number):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx (demo extra) is not installed")
    try:
        path = builtin.multistyle_file()
    except models.MissingExtraError as error:
        pytest.skip(str(error))
    x = photo(160)
    chosen = np.zeros(26, np.float32)
    chosen[number] = 1
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"image": (x / 255).numpy(), "style_weights": chosen})
    with torch.inference_mode():
        y = models.load_builtin(f"multistyle-{number}")(x)
    assert np.abs(y.numpy() - expected * 255).max() < 0.05  # levels of 255; a wrong row or eps gives tens


def test_unknown_builtin_style_is_refused():
    with pytest.raises(ValueError, match="multistyle-0 to multistyle-25"):
        models.load_builtin("multistyle-26")


def test_missing_style_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(models.MissingExtraError, match=r'pip install "sf_compile\[demo\]"'):
        models.load_builtin("multistyle-3")


def test_missing_onnx_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin, "multistyle_file", lambda: tmp_path / "multistyle26.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(models.MissingExtraError, match=r"onnx.*sf_compile\[demo\]"):
        models.load_builtin("multistyle-3")


def tables(net, styles=2):
    made = {}
    for path, layer in net.named_modules():
        if hasattr(layer, "norm"):
            made[f"{path}.w"] = torch.randn_like(layer.conv.conv2d.weight)
            for part in ("gamma", "beta"):
                made[f"{path}.norm.{part}"] = torch.randn(styles, layer.norm.num_features)
    return made


def test_a_style_is_a_row_of_gamma_and_beta():
    net = small(models.MultiStyleNet)
    given = tables(net)
    net.load_style(given, 1)
    last = net.expand[-1]
    assert torch.equal(last.conv.conv2d.weight, given["expand.2.w"])
    assert torch.equal(last.norm.weight, given["expand.2.norm.gamma"][1])
    assert torch.equal(last.norm.bias, given["expand.2.norm.beta"][1])
    assert torch.equal(net.res[0][1].norm.bias, given["res.0.1.norm.beta"][1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("contract.1.w"), "'contract.1.w' is missing"),
        (lambda t: t.update({"expand.0.w": torch.zeros(1)}), r"'expand.0.w' has shape \(1,\)"),
        (lambda t: t.update({"res.0.0.norm.beta": torch.zeros(1, 4)}), "style 1 is not one of the 1 rows"),
    ],
)
def test_wrong_style_tables_are_named(damage, message):
    net = small(models.MultiStyleNet)
    given = tables(net)
    damage(given)
    with pytest.raises(ValueError, match=message):
        net.load_style(given, 1)


def test_load_takes_a_file_or_a_style_name_and_names_close_styles(tmp_path):
    path = tmp_path / "multistyle-3"
    torch.save(small(models.TransformerNet).state_dict(), path)
    assert isinstance(models.load(path), models.TransformerNet)
    with pytest.raises(models.CheckpointError, match="did you mean multistyle-9"):
        models.load("multistyle9")
    with pytest.raises(models.CheckpointError, match="no such file, and no built-in style"):
        models.load("nothing/like/it.pth")
