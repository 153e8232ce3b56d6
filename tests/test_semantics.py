"""Programs whose meaning a rewrite could change: each is eager's, with the fused ops in it."""

from __future__ import annotations

import copy
import os
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from networks import Net, reflect
from torch import Tensor, nn

from sf_compile.backend import styleforge

SHAPE = (2, 4, 12, 10)


class Counting:
    """The backend; how many graphs it was given, and how many of our calls it put into each."""

    def __init__(self, backend: Any = styleforge) -> None:
        self.backend, self.graphs, self.ours = backend, 0, []

    def __call__(self, gm: Any, example_inputs: list[Any]) -> Any:
        self.graphs += 1
        if self.backend is not styleforge:
            return gm.forward
        return styleforge(gm, example_inputs, options={"fallback": self.count})

    def count(self, gm: Any, example_inputs: list[Any]) -> Any:
        self.ours.append(sum("styleforge" in str(node.target) for node in gm.graph.nodes))
        return gm.forward


def tensors(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def assert_eagers(model: Any, *inputs: Tensor, tolerance: float = 2e-5) -> Counting:
    """Compiled, ``model`` returns what eager PyTorch does and leaves in its inputs what eager does."""
    counting = Counting()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    own, eagers = [x.clone() for x in inputs], [x.clone() for x in inputs]
    ours, expected = tensors(compiled(*own)), tensors(model(*eagers))
    assert len(ours) == len(expected)
    for out, reference in zip((*ours, *own), (*expected, *eagers), strict=True):
        assert (out.shape, out.dtype, out.stride()) == (reference.shape, reference.dtype, reference.stride())
        if out.is_complex():
            out, reference = torch.view_as_real(out), torch.view_as_real(reference)
        assert relative_error(out, reference) < tolerance
    return counting


# What follows a convolution whose bias is large, and whether that bias can be seen in the result.
AFTER = {
    "instance norm": (lambda m, y: m.norm(y), False),
    "instance norm, relu, and a number": (lambda m, y: F.relu(m.plain(y)) + 1, False),
    "activation, then norm": (lambda m, y: m.norm(F.relu(y)), True),
    "running statistics": (lambda m, y: m.running(y), True),
    "batch norm": (lambda m, y: m.batch(y), True),
    "group norm": (lambda m, y: F.group_norm(y, 2), True),
    "nothing": (lambda m, y: y, True),
    "norm and another reader": (lambda m, y: (m.norm(y), torch.sigmoid(y)), True),
    "reflection pad, then norm": (lambda m, y: m.norm(reflect(y)), False),
    "zero pad, then norm": (lambda m, y: m.norm(F.pad(y, (1, 1, 1, 1))), True),
    "upsampling, then norm": (lambda m, y: m.norm(F.interpolate(y, scale_factor=2)), False),
}


@pytest.mark.parametrize("name", AFTER)
def test_a_bias_vanishes_in_front_of_an_instance_norm_and_nowhere_else(name):
    after, seen = AFTER[name]
    net = Net(lambda m, x: after(m, m.conv(reflect(x)))).double()
    x, outs = torch.randn(SHAPE, dtype=torch.float64), []
    with torch.no_grad():
        for bias in (0.0, 3.0):
            net.conv.bias.copy_(torch.tensor([bias, -bias, bias, 2 * bias]))
            assert_eagers(net, x, tolerance=1e-12)
            outs.append(tensors(torch.compile(net, backend=styleforge)(x)))
    moved = max(relative_error(a, b) for a, b in zip(*outs, strict=True))
    assert (moved > 1e-3) if seen else (moved < 1e-12)


def read_twice(m: Net, x: Tensor) -> Any:
    raw = m.conv(reflect(x))
    return F.relu(m.norm(raw)) * 2 + raw


def raw_and_normed_returned(m: Net, x: Tensor) -> Any:
    raw = m.conv(reflect(x))
    normed = m.norm(raw)
    return raw, normed, F.relu(m.plain(m.conv(reflect(normed))))


def padded_returned(m: Net, x: Tensor) -> Any:
    padded = reflect(F.relu(m.norm(x)))
    return m.plain(m.conv(padded)), padded


def written_after_it_was_read(m: Net, x: Tensor) -> Any:
    y = F.relu(m.norm(m.conv(reflect(x))))
    z = m.plain(m.conv(reflect(y)))
    y.mul_(2)
    return y, z


def written_before_the_second_reader(m: Net, x: Tensor) -> Any:
    y = m.norm(m.conv(reflect(x)))
    z = m.plain(m.conv(reflect(y)))
    y.add_(1)
    return z + m.batch(m.conv(reflect(y)))


def written_through_a_view(m: Net, x: Tensor) -> Any:
    y = m.norm(m.same(x))
    y[:, 1:3].zero_()
    return m.plain(m.conv(reflect(y)))


def view_of_what_is_written(m: Net, x: Tensor) -> Any:
    y = m.norm(m.same(x))
    rows = y[:, :, ::2]
    F.relu(y, inplace=True)
    return m.plain(m.conv(reflect(y))), rows + 1


def input_written_later(m: Net, x: Tensor) -> Any:
    y = m.norm(m.conv(reflect(x)))
    x.clamp_(min=0)
    return F.relu(m.plain(m.conv(reflect(y)))) + m.skip(x)[:, :, 1:-1, 1:-1].sum()


def residual_written_before_the_addition(m: Net, x: Tensor) -> Any:
    skip = x * 2
    y = m.norm(m.conv(reflect(skip)))
    skip.relu_()
    return y + skip


def residual_written_after_the_addition(m: Net, x: Tensor) -> Any:
    skip = x * 2
    y = m.norm(m.conv(reflect(skip))) + skip
    skip.mul_(3)
    return m.plain(m.conv(reflect(y)))


def activated_in_place_after_a_reader(m: Net, x: Tensor) -> Any:
    y = m.norm(m.same(x))
    z = m.conv(reflect(y))
    y.relu_()
    return m.plain(z), m.batch(m.conv(reflect(y)))


def added_twice(m: Net, x: Tensor) -> Any:
    x = F.relu(m.plain(x))
    return (m.norm(m.conv(reflect(x))) + x) + x


def added_to_a_broadcast(m: Net, x: Tensor) -> Any:
    return m.norm(m.same(x)) + x.mean((2, 3), keepdim=True)


def mutated_by_the_concatenated_activation(m: Net, x: Tensor) -> Any:
    y = m.norm(m.same(x))
    low = m.plain(m.down(F.leaky_relu(y, 0.2, True)))
    return torch.cat([F.interpolate(low, scale_factor=2), y], 1)


READERS = (
    read_twice, raw_and_normed_returned, padded_returned, written_after_it_was_read,
    written_before_the_second_reader, written_through_a_view, view_of_what_is_written, input_written_later,
    residual_written_before_the_addition, residual_written_after_the_addition,
    activated_in_place_after_a_reader, added_twice, added_to_a_broadcast,
    mutated_by_the_concatenated_activation,
)  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("body", READERS, ids=lambda body: body.__name__)
def test_every_reader_sees_what_eager_shows_it(body, grad):
    with torch.set_grad_enabled(grad):
        counting = assert_eagers(Net(body), torch.randn(SHAPE))
    assert counting.ours[0] > 0


def shift_written_later(m: Net, x: Tensor) -> Any:
    shift, scale = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)
    y = m.plain(m.conv(reflect(x))) * scale + shift
    shift += shift
    return F.relu(y)


def skip_written_later(m: Net, x: Tensor) -> Any:
    skip = m.same(x)
    y = m.norm(m.conv(reflect(x))) + skip
    skip[:, 1:3].zero_()
    return F.relu(m.plain(m.conv(reflect(y))))


def bias_written_later(m: Net, x: Tensor) -> Any:
    bias = m.conv.bias * 2
    y = F.conv2d(reflect(x), m.conv.weight, bias)
    y = m.plain(F.relu(y))
    bias.view(2, 2).mul_(3)
    return y


def picture_written_later(m: Net, x: Tensor) -> Any:
    picture = x * 2
    y = F.relu(m.plain(m.conv(reflect(picture))))
    picture[:, 1:3].zero_()
    return m.plain(m.same(reflect(y)))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    "body", [shift_written_later, skip_written_later, bias_written_later, picture_written_later]
)
def test_what_eager_only_adds_or_pads_may_be_written_before_the_backward_pass(body, grad):
    model, x = Net(body), torch.randn(SHAPE)
    with torch.set_grad_enabled(grad):
        ours = assert_eagers(model, x).ours[0]
        if not grad:
            return
    compiled = torch.compile(model, backend=styleforge)
    gradients = []
    for run in (compiled, model):
        model.zero_grad()
        run(x).pow(3).sum().backward()
        gradients.append(model.conv.weight.grad.clone())
    assert relative_error(*gradients) < 1e-3
    with torch.no_grad():
        assert assert_eagers(model, x).ours[0] > ours  # more is fused where nothing is differentiated


def normalised_after_it_was_padded(m: Net, x: Tensor) -> Any:
    return m.conv(reflect(F.relu(m.plain(m.conv(reflect(x))))))


def normalised_after_it_was_enlarged(m: Net, x: Tensor) -> Any:
    return F.relu(m.plain(m.same(F.interpolate(x, scale_factor=2))))


def normalised_after_it_was_added(m: Net, x: Tensor) -> Any:
    return m.conv(reflect(x + m.norm(m.conv(reflect(x)))))


def normalised_after_it_was_activated(m: Net, x: Tensor) -> Any:
    return m.plain(m.conv(reflect(torch.tanh(x))))


def normalised_after_it_was_copied_at_its_edges(m: Net, x: Tensor) -> Any:
    return m.plain(m.conv(F.pad(x, (1, 1, 1, 1), mode="replicate")))


def normalised_after_it_was_padded_with_zeros(m: Net, x: Tensor) -> Any:
    return m.plain(m.conv(F.pad(x, (1, 1, 1, 1))))


def normalised_after_it_was_padded_by_nothing(m: Net, x: Tensor) -> Any:
    return m.plain(m.conv(F.pad(x, (0, 0, 0, 0))))


def normalised_after_it_was_normed(m: Net, x: Tensor) -> Any:
    return m.conv(reflect(m.plain(x)))


def normalised_after_it_was_rounded(m: Net, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return m.plain(m.same(x))


def stretched_to_a_byte(m: Net, x: Tensor) -> Any:
    return torch.tanh(m.conv(reflect(F.relu(m.plain(m.conv(reflect(x))))))) * 150 + 127.5


@pytest.mark.parametrize("fallback", ["eager", "inductor"])
@pytest.mark.parametrize(
    "body",
    [
        normalised_after_it_was_padded,
        normalised_after_it_was_enlarged,
        normalised_after_it_was_added,
        normalised_after_it_was_activated,
        normalised_after_it_was_copied_at_its_edges,
        normalised_after_it_was_padded_with_zeros,
        normalised_after_it_was_padded_by_nothing,
        normalised_after_it_was_normed,
        normalised_after_it_was_rounded,
        stretched_to_a_byte,
    ],
    ids=lambda body: body.__name__,
)
def test_a_training_step_may_normalise_picture_and_result_in_place(body, fallback):
    """As PyTorch's own example of fast neural style does before it computes the loss."""
    if fallback == "inductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("Inductor needs a C++ compiler, and there is no g++")
    model, gradients, counting = Net(body), [], Counting()
    torch.compile(model, backend=counting)(torch.rand(SHAPE))
    assert counting.ours[0] > 0
    for run in (torch.compile(model, backend=styleforge, options={"fallback": fallback}), model):
        model.zero_grad()
        torch.manual_seed(0)
        picture = torch.rand(SHAPE)
        result = run(picture)
        if body is not normalised_after_it_was_enlarged:  # ReLU reads its result
            result = result.div_(3)
        (result - picture.div_(3).mean()).pow(3).sum().backward()
        gradients += [[w.grad for w in (model.conv.weight, model.same.weight) if w.grad is not None]]
    tolerance = 3e-2 if body is normalised_after_it_was_rounded else 1e-4
    assert all(relative_error(*pair) < tolerance for pair in zip(*gradients, strict=True))


class Standardised(nn.Module):
    """Weight standardisation, and a spectral norm by hand: the weights are made inside the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3)
        self.second = nn.Conv2d(4, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.first.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        y = F.relu(F.instance_norm(F.conv2d(reflect(x), w, self.first.bias)))
        v = self.second.weight
        return F.instance_norm(F.conv2d(reflect(y), v / torch.linalg.matrix_norm(v.flatten(1), 2))) + x


def test_weights_made_inside_the_graph():
    model, x = Standardised(), torch.randn(SHAPE)
    # The standardisation is a norm over (C, H, W) of the weight: three more ops.
    assert assert_eagers(model, x).ours[0] == 6
    compiled = torch.compile(model, backend=styleforge)
    for change in (lambda: None, lambda: model.first.weight.data.mul_(torch.rand(4, 1, 1, 1) + 1)):
        change()
        gradients = []
        for run in (compiled, model):
            model.zero_grad()
            run(x).pow(3).sum().backward()
            gradients.append([p.grad.clone() for p in (model.first.weight, model.second.weight)])
        for got, expected in zip(*gradients, strict=True):
            assert relative_error(got, expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_autocast_region_between_fused_sites(dtype):
    def body(m: Net, x: Tensor) -> Any:
        y = F.relu(m.norm(m.conv(reflect(x))))
        with torch.autocast("cpu", dtype):
            z = m.plain(m.conv(reflect(y)))
        return m.norm(m.conv(reflect(y + z.float())))

    model, x = Net(body), torch.randn(SHAPE)
    with torch.no_grad():
        ours = torch.compile(model, backend=(counting := Counting()), fullgraph=True)(x)
        # What enters the region may differ by a rounding of float32, and so by one of the region's own.
        assert relative_error(ours, model(x)) < 4 * torch.finfo(dtype).eps
    assert counting.ours[0] == 6  # a convolution and the norm at its end: before the region, in it, after it


def test_functional_call_reads_the_weights_it_was_given():
    def body(m: Net, x: Tensor) -> Tensor:
        return m.conv(reflect(F.relu(m.norm(m.conv(reflect(x))))))

    model, x, counting = Net(body), torch.randn(SHAPE), Counting()

    def call(weights: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(model, weights, (x,))

    compiled = torch.compile(call, backend=counting, fullgraph=True)
    for seed in range(2):
        torch.manual_seed(seed)
        weights = {name: torch.randn_like(value) for name, value in model.named_parameters()}
        assert relative_error(compiled(weights, x), call(weights, x)) < 2e-5
    assert counting.ours == [2] and counting.graphs == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_pictures_are_left_alone(dtype):
    def body(m: Net, x: Tensor) -> Tensor:
        weight = torch.complex(m.conv.weight, m.conv.weight * 2).to(dtype)
        padded = F.pad(F.pad(x, (1, 1, 1, 1)), (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, weight) + F.pad(x, (1, 1, 1, 1))

    counting = assert_eagers(Net(body), torch.randn(SHAPE, dtype=dtype))
    assert counting.ours == [0]


def test_the_real_part_beside_a_complex_one():
    def body(m: Net, x: Tensor) -> Tensor:
        y = F.relu(m.norm(m.conv(reflect(x))))
        return torch.fft.ifft2(torch.fft.fft2(y) * 2).real + m.conv(reflect(y))

    assert assert_eagers(Net(body), torch.randn(SHAPE)).ours[0] > 0


def network(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.norm(m.down(x)))
    x = m.plain(m.conv(reflect(F.relu(m.norm(m.conv(reflect(x))))))) + x
    return m.conv(reflect(F.interpolate(x, scale_factor=2)))


def test_five_batches_cost_at_most_three_backend_calls():
    model, counting = Net(network), Counting()
    compiled = torch.compile(model, backend=counting)
    with torch.no_grad():
        for batch in (2, 1, 3, 5, 8):
            x = torch.randn(batch, 4, 12, 10)
            assert relative_error(compiled(x), model(x)) < 2e-5
    assert counting.graphs <= 3 and all(counting.ours)


def test_calls_recompile_only_where_the_eager_backend_does():
    """Sizes, batches, layouts, grad modes, strides of inputs and changed weights, in one order."""
    graphs = []
    for backend in (styleforge, "eager"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, counting = Net(network), Counting(backend)
        compiled = torch.compile(model, backend=counting)
        for shape in ((2, 4, 12, 10), (1, 4, 16, 12), (3, 4, 8, 20)):
            x = torch.randn(shape)
            with torch.no_grad():
                compiled(x)
                compiled(x.contiguous(memory_format=torch.channels_last))
                compiled(torch.randn(shape[0], 4, shape[3], shape[2]).transpose(2, 3))
            compiled(x.requires_grad_()).sum().backward()
            with torch.no_grad():
                model.conv.weight.mul_(1.1)
                model.load_state_dict(copy.deepcopy(model.state_dict()))
            compiled(x.detach())
        graphs.append(counting.graphs)
    assert graphs[0] == graphs[1] > 0
