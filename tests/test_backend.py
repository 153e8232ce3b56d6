import copy
import logging
import os
import shutil
import threading
from importlib import metadata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, psnr, relative_error
from torch import nn

from sf_compile.backend import styleforge
from sf_compile.models import TransformerNet, load_checkpoint

MARKED_BY_TORCH = {"_is_torch_compile"}  # torch.compile leaves it, whatever the backend
CHECKPOINTS = ("candy_nc16", "mosaic_nc16", "rain_princess_nc16", "udnie_nc16")


class Recorder:
    """The backend, keeping the graphs it was given and those it handed to the fallback."""

    def __init__(self, **options):
        self.options, self.graphs, self.rewritten = options, [], []

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm)
        return styleforge(gm, example_inputs, options={"fallback": self.fallback, **self.options})

    def fallback(self, gm, example_inputs):
        self.rewritten.append(gm)
        return gm.forward

    def ours(self):
        """How many of our ops each graph holds."""
        return [sum("styleforge" in str(n.target) for n in gm.graph.nodes) for gm in self.rewritten]


def small_net():
    net = TransformerNet(4, 1).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net


def picture(height=16, width=20, batch=1):
    return torch.rand(batch, 3, height, width) * 255


def assert_close(out, expected, tolerance=2e-5):
    assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert relative_error(out.detach(), expected.detach()) < tolerance


def test_the_backend_is_found_by_name():
    names = [point.name for point in metadata.entry_points(group="torch_dynamo_backends")]
    if "styleforge" not in names:
        pytest.skip("sf_compile is not installed here; test_package.py looks it up in a built wheel")
    net, x = small_net(), picture()
    assert_close(torch.compile(net, backend="styleforge")(x), net(x))


@pytest.mark.parametrize(
    "function",
    [lambda x: torch.sigmoid(x) * 2, lambda x: F.conv2d(x, torch.ones(2, 3, 3, 3)), nn.Upsample(None, 2)],
    ids=["no rule", "a bare convolution", "an upsampling alone"],
)
def test_a_graph_with_nothing_to_fuse_comes_back_as_it_came(function, caplog):
    seen = []

    def backend(gm, example_inputs):
        code, nodes = gm.code, list(gm.graph.nodes)
        out = styleforge(gm, example_inputs)
        seen.append(out == gm.forward and out.__self__ is gm)
        seen.append(gm.code == code and list(gm.graph.nodes) == nodes)
        return out

    x = picture()
    with caplog.at_level(logging.DEBUG, logger="sf_compile"):
        out = torch.compile(function, backend=backend)(x)
    assert seen == [True, True]
    assert torch.equal(out, function(x))
    records = [r for r in caplog.records if r.name == "sf_compile.backend"]
    assert [r.levelname for r in records] == ["DEBUG"]
    assert "nothing to fuse in a graph of" in records[0].getMessage()


def test_dynamos_graph_is_not_modified():
    recorder, before, after = Recorder(), [], []

    def backend(gm, example_inputs):
        before.append((gm.code, [n.format_node() for n in gm.graph.nodes], dict(gm.named_parameters())))
        out = recorder(gm, example_inputs)
        after.append((gm.code, [n.format_node() for n in gm.graph.nodes], dict(gm.named_parameters())))
        return out

    torch.compile(small_net(), backend=backend)(picture())
    assert len(before) == 1 and before == after and recorder.ours()[0] > 0
    assert recorder.rewritten[0] is not recorder.graphs[0]


def snapshot(model):
    """Every attribute of every module, by identity, with the tensors' values."""
    state = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in MARKED_BY_TORCH:
                held = [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else None
                state[path, name] = (id(value), held)
    return state, {name: value.clone() for name, value in model.state_dict().items()}


def test_the_users_module_is_not_modified():
    net = small_net()
    net.relu.register_forward_hook(lambda module, args, out: None)
    attributes, values = snapshot(net)
    forward, own = net.forward.__func__, "forward" in vars(net)
    compiled = torch.compile(net, backend=styleforge)
    with torch.no_grad():
        compiled(picture())
    compiled(picture()).sum().backward()
    net.zero_grad(set_to_none=True)
    after, after_values = snapshot(net)
    assert after == attributes
    assert all(torch.equal(value, after_values[name]) for name, value in values.items())
    assert (net.forward.__func__, "forward" in vars(net)) == (forward, own)


def test_forward_hooks_fire_as_in_eager():
    net, x = small_net(), picture()
    calls = []
    net.in1.register_forward_hook(lambda module, args, out: calls.append(("norm", out.shape)))
    net.in2.register_forward_hook(lambda module, args, out: out * 2)
    net.conv3.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net.register_forward_hook(lambda module, args, out: calls.append(("net", out.shape)))
    expected = net(x)
    eager_calls = list(calls)
    calls.clear()
    out = torch.compile(net, backend=styleforge)(x)
    assert calls == eager_calls and len(calls) == 2
    assert_close(out, expected)


def test_five_sizes_take_at_most_three_backend_calls():
    net, recorder = TransformerNet(8, 2).eval(), Recorder()
    compiled = torch.compile(net, backend=recorder)
    with torch.no_grad():
        for height, width in ((32, 48), (40, 36), (33, 51), (64, 20), (21, 30)):
            x = picture(height, width)
            assert_close(compiled(x), net(x))
    assert len(recorder.graphs) <= 3
    assert all(count > 0 for count in recorder.ours())


def test_every_grad_mode():
    net, x = small_net(), picture()
    compiled = torch.compile(net, backend=styleforge)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.enable_grad, torch.no_grad):
        with mode():
            out, expected = compiled(x), net(x)
        assert out.requires_grad == expected.requires_grad
        assert out.is_inference() == expected.is_inference()
        assert_close(out, expected)


def test_a_fallback_callable_gets_the_rewritten_graph_and_is_used():
    seen = []

    def fallback(gm, example_inputs):
        seen.append((gm, example_inputs))
        return lambda *args: tuple(out + 1000 for out in gm(*args))

    net, x = small_net(), picture()
    out = torch.compile(net, backend=styleforge, options={"fallback": fallback})(x)
    ((gm, example_inputs),) = seen
    assert isinstance(gm, torch.fx.GraphModule)
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(torch.ops.styleforge.conv2d.default) == 8
    assert torch.conv2d not in targets and F.instance_norm not in targets
    assert len(example_inputs) == sum(node.op == "placeholder" for node in gm.graph.nodes)
    assert_close(out, net(x) + 1000)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_option_never_changes_the_result(layout):
    net, x = small_net(), picture()
    compiled = torch.compile(net, backend=styleforge, options={"layout": layout})
    assert_close(compiled(x), net(x))


def test_inductor_runs_what_is_not_replaced():
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("Inductor needs a C++ compiler, and there is no g++")
    net, x = TransformerNet(8, 1).eval(), picture(24, 20)

    def model(x):
        return torch.sigmoid(net(x / 255) * 2) + x.mean()

    compiled = torch.compile(model, backend=styleforge, options={"fallback": "inductor"})
    with torch.no_grad():
        assert_close(compiled(x), model(x))


def test_each_graph_of_a_broken_model_is_handled_on_its_own():
    net, x = small_net(), picture()

    def model(x):
        y = net.relu(net.in1(net.conv1(x)))
        torch._dynamo.graph_break()
        y = torch.sigmoid(y)
        torch._dynamo.graph_break()
        return net.in2(net.conv2(y))

    recorder = Recorder()
    assert_close(torch.compile(model, backend=recorder)(x), model(x))
    first, second, third = recorder.ours()
    assert first > 0 and second == 0 and third > 0
    assert recorder.rewritten[1] is recorder.graphs[1]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("where", ["model", "input", "model and input"])
def test_channels_last_gives_eagers_strides(where, grad):
    net, x = small_net(), picture(batch=2)
    if "model" in where:
        net = net.to(memory_format=torch.channels_last)
    if "input" in where:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(grad):
        assert_close(torch.compile(net, backend=styleforge)(x), net(x))


@pytest.mark.parametrize("stem", CHECKPOINTS)
def test_real_networks_paint_the_same_picture(stem, weights, photo_path):
    image = pytest.importorskip("PIL.Image", reason="reading the photograph needs Pillow")
    with image.open(photo_path) as photo:
        pixels = np.asarray(photo.convert("RGB").resize((132, 100)), dtype=np.float32)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    net = load_checkpoint(weights / f"{stem}.pth")
    with torch.no_grad():
        out, expected = torch.compile(net, backend=styleforge)(x), net(x)
    assert expected.std() > 20 and out.stride() == expected.stride()
    assert psnr(out, expected) > 90


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_batch_norm(training):
    net = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net.train(training)
    net[2].running_mean.normal_()
    net[2].running_var.uniform_(0.5, 2)
    twin, recorder = copy.deepcopy(net), Recorder()
    compiled = torch.compile(net, backend=recorder)
    for x in (torch.randn(2, 3, 8, 9), torch.randn(2, 3, 8, 9)):
        assert_close(compiled(x), twin(x))
    targets = [node.target for node in recorder.rewritten[0].graph.nodes]
    assert (torch.ops.styleforge.normalize.default in targets) is not training
    for name, value in twin.state_dict().items():
        assert torch.allclose(value, net.state_dict()[name], rtol=1e-5), name


def test_autocast_inside_and_outside_is_eagers():
    net, x = small_net(), picture()

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    for around in (False, True):
        recorder = Recorder()
        compiled = torch.compile(net if around else inside, backend=recorder)
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            out = compiled(x)
        reference = inside(x)
        assert (out.dtype, out.stride()) == (torch.bfloat16, reference.stride())
        # Both round what lies between the layers, in places of their own.
        exact = copy.deepcopy(net).double()(x.double())
        assert relative_error(out, exact) < 1.25 * relative_error(reference, exact)
        assert recorder.ours()[0] > 0


def test_leaving_autocast_compiles_the_fused_graph():
    net, x, recorder = small_net(), picture(), Recorder()
    compiled = torch.compile(net, backend=recorder)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x)
    assert_close(compiled(x), net(x))
    assert [count > 0 for count in recorder.ours()] == [True, True]


def test_two_threads_may_call_one_compiled_model():
    net = small_net()
    compiled = torch.compile(net, backend=styleforge)
    pictures = [picture(16, 20), picture(24, 16)]
    expected = [net(x).detach() for x in pictures]
    results, failures = [[], []], []

    def work(index):
        try:
            with torch.no_grad():
                results[index].extend(compiled(pictures[index]) for _ in range(10))
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and [len(outs) for outs in results] == [10, 10]
    for outs, reference in zip(results, expected, strict=True):
        for out in outs:
            assert_close(out, reference)
