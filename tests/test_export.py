"""torch.export: a fused program equals the exported one, is saved and loaded, and what is not ours stays."""

import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from networks import Net, residual_network
from test_package import ROOT
from test_package import run as run_alone
from torch import nn

import sf_compile
from sf_compile.models import TransformerNet

SIZES = {
    0: torch.export.Dim("n", min=1, max=8),
    2: 4 * torch.export.Dim("h", min=4, max=32),
    3: 4 * torch.export.Dim("w", min=4, max=32),
}
LOAD = """
import sys, torch
import sf_compile.ops
program = torch.export.load(sys.argv[1] if len(sys.argv) > 1 else "net.pt2")
x, expected = torch.load("io.pt")
out = program.module()(x)
print(torch.equal(out, expected), sum("styleforge" in str(n.target) for n in program.graph.nodes))
"""


def ours(program):
    return [node for node in program.graph.nodes if "styleforge" in str(node.target)]


def others(program):
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"} - {
        str(n.target) for n in ours(program)
    }


class Mixed(nn.Module):
    """What is fused beside what is left in every spelling that ``from_aten`` knows."""

    def __init__(self):
        super().__init__()
        self.conv, self.same = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding="same", dilation=2)
        self.norm, self.batch = nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4)
        self.updated = nn.InstanceNorm2d(4, track_running_stats=True)

    def forward(self, x):
        y = F.relu(self.norm(self.conv(F.pad(x, (1, 1, 1, 1), mode="reflect"))))
        z = self.same(F.pad(y, (1, 1, 1, 1), "constant", 2.0)).relu_()
        z += 1
        z = z + F.interpolate(y, scale_factor=2.0)[:, :, : z.shape[2], : z.shape[3]]
        z = self.updated(self.batch(z.sin()).relu())
        return torch.add(z, z, alpha=2), F.interpolate(z, size=(7, 9))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_style_network(dynamic):
    net, x = TransformerNet(4, 2).eval(), torch.rand(2, 3, 32, 24) * 255
    program = torch.export.export(net, (x,), dynamic_shapes=({**SIZES},) if dynamic else None)
    before = str(program)
    with torch.no_grad():
        fused = sf_compile.compile(program)
        assert len(ours(fused)) > 6 and not any("conv2d" in name for name in others(fused))
        for size in ((2, 3, 32, 24), (1, 3, 48, 64)) if dynamic else ((2, 3, 32, 24),):
            x = torch.rand(size) * 255
            out, expected = fused.module()(x), net(x)
            assert (out.shape, out.stride()) == (expected.shape, expected.stride())
            assert relative_error(out, expected) < 2e-5
    assert str(program) == before


ACTIVATIONS = {
    "leaky_relu": lambda m, y: F.leaky_relu(y, 0.2), "prelu": lambda m, y: F.prelu(y, m.batch.weight),
    "elu": lambda m, y: F.elu(y), "hardtanh": lambda m, y: F.hardtanh(y, -0.5, 1.0),
    "clamp": lambda m, y: y.clamp(min=-0.5), "tanh": lambda m, y: y.tanh(),
    "sigmoid": lambda m, y: torch.sigmoid(y), "silu": lambda m, y: F.silu(y),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_transposed_convolutions(name):
    """Fused behind a norm; by themselves, at the end, ATen again."""
    activate = ACTIVATIONS[name]

    def body(m, x):
        y = activate(m, m.norm(F.conv_transpose2d(x, m.conv.weight, None, 2, 1, 1)))
        return activate(m, torch.sin(y)) + F.conv_transpose2d(torch.sin(x), m.conv.weight, None, 2, 1, 1)

    net, x = Net(body), torch.randn(2, 4, 6, 5)
    program = torch.export.export(net, (x,))
    with torch.no_grad():
        fused = sf_compile.compile(program)
        assert relative_error(fused.module()(x), net(x)) < 2e-5
    assert len(ours(fused)) == 2 and str(ours(fused)[1].args[6]).startswith(name)
    kept = {f"aten.{name}.default", "aten.conv_transpose2d.input"}
    assert kept <= others(program) and kept <= others(fused)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_what_is_left_alone_is_aten_again(training):
    net, x = Mixed().train(training), torch.randn(2, 3, 10, 8)
    program = torch.export.export(net, (x,))
    fused = sf_compile.compile(program)
    assert ours(fused)
    assert all(name.startswith(("aten.", "<built-in function")) for name in others(fused)), others(fused)
    for out, expected in zip(fused.module()(x), program.module()(x), strict=True):
        assert relative_error(out, expected) < 1e-5
    left = [node for node in program.graph.nodes if node.target is torch.ops.aten.instance_norm.default][-1]
    kept = [node for node in fused.graph.nodes if node.target is torch.ops.aten.instance_norm.default]
    assert not training or (left.args[5:] == kept[-1].args[5:])


def test_gradients():
    net, x = Net(residual_network), torch.randn(2, 4, 12, 12)
    fused = sf_compile.compile(torch.export.export(net, (x,))).module()
    fused(x).sum().backward()
    net(x).sum().backward()
    expected = dict(net.named_parameters())
    compared = 0
    for name, parameter in fused.named_parameters():
        if expected[name].grad is not None and expected[name].grad.abs().max() > 1e-3:
            assert relative_error(parameter.grad, expected[name].grad) < 1e-3, name
            compared += 1
    assert compared > 3


def test_a_program_with_nothing_to_fuse_is_returned_as_it_is(caplog):
    program = torch.export.export(nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 8, 8),))
    with caplog.at_level(logging.DEBUG, logger="sf_compile.export"):
        assert sf_compile.compile(program) is program
    assert "nothing to fuse" in caplog.text
    net = TransformerNet(4, 1).eval()
    lowered = torch.export.export(net, (torch.rand(1, 3, 16, 16),)).run_decompositions()
    assert sf_compile.compile(lowered) is lowered


def test_saved_and_loaded_in_another_process(tmp_path):
    net, x = TransformerNet(4, 2).eval(), torch.rand(1, 3, 16, 24) * 255
    with torch.no_grad():
        fused = sf_compile.compile(torch.export.export(net, (x,)))
        torch.save((x, fused.module()(x)), tmp_path / "io.pt")
    torch.export.save(fused, tmp_path / "net.pt2")
    assert run_alone(LOAD, tmp_path, ROOT)[0] == f"True {len(ours(fused))}"
    done = subprocess.run(
        [sys.executable, "-c", LOAD.replace("import sf_compile.ops", "")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode and "styleforge" in done.stderr


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"takes what torch\.export\.export returns, got TransformerNet"):
        sf_compile.compile(TransformerNet(4, 1))
    program = torch.export.export(nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 8, 8),))
    with pytest.raises(ValueError, match="no fallback but 'eager'"):
        sf_compile.compile(program, options={"fallback": "inductor"})
