import copy
import os
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sf_compile.backend import styleforge
from sf_compile.models import MultiStyleNet, TensorFlowTransformNet, TransformerNet

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
NETWORKS = {
    "transformer": lambda: TransformerNet(4, 1),
    "tensorflow": lambda: TensorFlowTransformNet(3, 1),
    "multistyle": lambda: MultiStyleNet(4, 1, (4, 2)),
}


def compiled(model, **settings):
    return torch.compile(model, backend=styleforge, **settings)


def picture(dtype=torch.float32, layout="contiguous", shape=(2, 3, 16, 12)):
    return torch.rand(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])


def gradients(run, model, x, target):
    """Loss, and gradients of every parameter and of ``x`` where they require one."""
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if x.requires_grad:
        leaves["input"] = x
    loss = F.mse_loss(run(x), target)
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def cancelled(model, x, target):
    """Names of the gradients that are 0 in exact arithmetic, so that eager's are rounding noise.

    A constant added to a channel in front of an instance norm, such as a convolution's bias, has no effect.
    """
    exact = copy.deepcopy(model).double()
    _, found = gradients(exact, exact, x.detach().double().requires_grad_(x.requires_grad), target.double())
    largest = max(gradient.norm() for gradient in found.values())
    return {name for name, gradient in found.items() if gradient.norm() < 1e-12 * largest}


def assert_same_gradients(run, model, x, tolerance):
    target = torch.rand_like(model(x))
    loss, expected = gradients(model, model, x, target)
    own_loss, got = gradients(run, model, x, target)
    assert relative_error(own_loss, loss) < tolerance
    assert list(got) == list(expected)
    largest = max(gradient.norm() for gradient in expected.values())
    noise = cancelled(model, x, target)
    assert len(noise) < len(expected)
    for name, gradient in expected.items():
        assert (got[name].shape, got[name].dtype) == (gradient.shape, gradient.dtype)
        scale = largest if name in noise else gradient.norm()
        assert (got[name] - gradient).norm() <= tolerance * scale, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_gradient_equals_eagers(kind, dtype, layout):
    model = NETWORKS[kind]().to(dtype).to(memory_format=LAYOUTS[layout])
    assert_same_gradients(compiled(model), model, picture(dtype, layout).requires_grad_(), TOLERANCE[dtype])


def test_gradients_with_dynamic_shapes():
    model, recorder = TransformerNet(4, 1).double(), []

    def backend(gm, example_inputs):
        recorder.append(gm)
        return styleforge(gm, example_inputs)

    run = torch.compile(model, backend=backend, dynamic=True)
    for shape in ((1, 3, 16, 12), (3, 3, 13, 22)):
        assert_same_gradients(run, model, picture(torch.float64, shape=shape).requires_grad_(), 1e-9)
    assert len(recorder) <= 2


def test_gradients_through_inductor():
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("Inductor needs a C++ compiler, and there is no g++")
    layers = (nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Sigmoid())
    model = nn.Sequential(*layers).double()
    x = picture(torch.float64).requires_grad_()
    assert_same_gradients(compiled(model, options={"fallback": "inductor"}), model, x, 1e-9)


@pytest.mark.parametrize("frozen", ["in1", "in", "conv", "weight", "bias", "."])
def test_frozen_parameters_get_no_gradient(frozen):
    model = TransformerNet(4, 1).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    x = picture(torch.float64).requires_grad_()
    run = compiled(model)
    assert_same_gradients(run, model, x, 1e-9)
    run(x).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert x.grad is not None


def test_unfreezing_after_compile_takes_effect():
    model, x = TransformerNet(4, 1).requires_grad_(False), picture()
    run = compiled(model)
    assert not run(x).requires_grad
    model.requires_grad_(True)
    run(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_optimizer_steps_give_eagers_weights(optimizer):
    model = TransformerNet(4, 1).double()
    twin, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    x, target = picture(torch.float64), torch.rand(2, 3, 16, 12, dtype=torch.float64)
    # Out of a gradient of pure rounding noise, Adam makes a full step in a random direction.
    left_out = cancelled(model, x, target)
    trained = [[p for name, p in m.named_parameters() if name not in left_out] for m in (model, twin)]
    for run, parameters in zip((compiled(model), twin), trained, strict=True):
        steps = optimizer(parameters, lr=1e-2)
        losses = []
        for _ in range(3):
            steps.zero_grad()
            loss = F.mse_loss(run(x), target)
            loss.backward()
            steps.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
    for name, value in twin.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-7, atol=1e-9), name
        assert torch.equal(value, start[name]) == (name in left_out), name


def test_gradcheck_of_a_small_fused_chain():
    shapes = ((1, 2, 3, 3), (2, 2, 3, 3), (1, 2, 2, 2), (2,), (2,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def chain(x, first, second, scale, shift):
        y = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), first)
        y = F.relu(F.instance_norm(y, weight=scale, bias=shift)) + x
        y = F.interpolate(y, scale_factor=2, mode="nearest")
        return F.instance_norm(F.conv2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), second, stride=2))

    assert torch.autograd.gradcheck(compiled(chain), inputs)


def test_gradients_of_gradients_equal_eagers():
    model = TransformerNet(3, 1).double()
    x = picture(torch.float64, shape=(1, 3, 8, 8)).requires_grad_()

    def penalty(run):
        (gradient,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        leaves = [parameter for name, parameter in model.named_parameters() if not name.endswith("bias")]
        return torch.autograd.grad(gradient.square().sum(), [x, *leaves])

    for got, expected in zip(penalty(compiled(model)), penalty(model), strict=True):
        assert relative_error(got, expected) < 1e-7


def two_layers():
    first = (nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU())
    return nn.Sequential(*first, nn.ReflectionPad2d(1), nn.Conv2d(4, 3, 3))


def load_other_weights(net):
    net.load_state_dict(two_layers().state_dict())


def step_the_optimizer(net):
    net(picture()).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net.zero_grad(set_to_none=True)


def write_in_place(net):
    with torch.no_grad():
        net[5].weight.mul_(1.5)
        net[2].bias.add_(1)


def replace_parameters(net):
    net[1].weight = nn.Parameter(torch.randn_like(net[1].weight))
    net[2].weight.data = torch.rand(4) + 1
    net[5].bias = None


def go_through_half(net):
    net.half().float()


CHANGES = [load_other_weights, step_the_optimizer, write_in_place, replace_parameters, go_through_half]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_weights_changed_after_compile_take_effect(grad, change):
    net, x = two_layers(), picture()
    run = compiled(net)
    with torch.set_grad_enabled(grad):
        before = run(x).detach()
        with torch.enable_grad():
            change(net)
        out, expected = run(x), net(x)
    assert not torch.equal(expected, before)
    assert relative_error(out.detach(), expected.detach()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_model_converted_after_compile_runs_in_its_new_dtype(dtype):
    net, x = TransformerNet(4, 1), picture()
    run = compiled(net)
    with torch.no_grad():
        exact = net.double()(x.double())
        net.float()
        run(x)
        net.to(dtype)
        out, eager = run(x.to(dtype)), net(x.to(dtype))
    assert (out.dtype, out.stride()) == (dtype, eager.stride())
    assert relative_error(out, exact) <= max(1.25 * relative_error(eager, exact), 1e-12)


def test_a_deep_copy_of_a_compiled_model_is_independent():
    net, x = two_layers(), picture()
    run = compiled(net)
    run(x)
    twins = [copy.deepcopy(net), copy.deepcopy(run)]
    write_in_place(net)
    for twin in twins:
        assert not torch.equal(twin(x), net(x))
    for out, expected in ((twins[1](x), twins[0](x)), (run(x), net(x))):
        assert relative_error(out.detach(), expected.detach()) < 2e-5


class _Gradients(TorchDispatchMode):
    """Notes whether what PyTorch differentiates a convolution by is planar."""

    def __init__(self) -> None:
        super().__init__()
        self.planar: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.planar.append(all(x.is_contiguous() for x in args[:3]))
        return func(*args, **(kwargs or {}))


def test_a_strided_kernel_of_1_is_differentiated_in_planes_on_a_cpu():
    """In channels_last PyTorch 2.13 writes behind the gradient of its weight."""
    down = nn.Conv2d(3, 3, 1, stride=2)
    model = nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(3, 3, 3), nn.InstanceNorm2d(3), nn.ReLU(),
        down, nn.InstanceNorm2d(3), nn.ReflectionPad2d(1), nn.Conv2d(3, 3, 3),
    )  # fmt: skip
    x = torch.randn(2, 3, 12, 10)
    out = torch.compile(model, backend=styleforge, fullgraph=True)(x)
    with _Gradients() as gradients:
        (ours,) = torch.autograd.grad(out.pow(2).sum(), [down.weight])
    assert gradients.planar.count(True) >= 1 and gradients.planar[1]
    (theirs,) = torch.autograd.grad(model(x).pow(2).sum(), [down.weight])
    assert relative_error(ours, theirs) < 1e-4
