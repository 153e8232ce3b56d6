"""torch.compile(...).aot_compile(...): what was compiled is saved, and runs in another process."""

import sys

import pytest
import torch
from cases import relative_error
from test_package import ROOT
from test_package import run as run_alone
from torch import nn

from sf_compile.backend import styleforge
from sf_compile.models import TransformerNet

LOAD = """
import torch
x, state, expected = torch.load("io.pt")
with open("net.bin", "rb") as file:
    loaded = torch.compiler.load_compiled_function(file)
from sf_compile.models import TransformerNet
net = TransformerNet(4, 2).eval()
net.load_state_dict(state)
with torch.no_grad():
    print(torch.equal(loaded(net, x), expected), torch.equal(loaded(net, x), expected))
"""

aot = pytest.mark.skipif(
    not hasattr(torch.compiler, "load_compiled_function"), reason="needs PyTorch 2.13: aot_compile"
)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).sin()


def aot_compiled(net, x):
    compiled = torch.compile(net.forward, backend=styleforge, fullgraph=True)
    with torch.no_grad():
        return compiled.aot_compile(((x,), {}))


@aot
def test_saved_and_loaded_in_another_process(tmp_path):
    net, x = TransformerNet(4, 2).eval(), torch.rand(1, 3, 16, 24) * 255
    function = aot_compiled(net, x)
    with torch.no_grad():
        out, expected = function(net, x), net(x)
    assert relative_error(out, expected) < 2e-5 and not torch.equal(out, expected)
    function.save_compiled_function(str(tmp_path / "net.bin"))
    torch.save((x, net.state_dict(), out), tmp_path / "io.pt")
    assert run_alone(LOAD, tmp_path, ROOT)[0] == "True True"
    # A second save, after the first one stripped what it could not write.
    function.save_compiled_function(str(tmp_path / "net.bin"))
    assert run_alone(LOAD, tmp_path, ROOT)[0] == "True True"


@aot
def test_a_graph_with_nothing_to_fuse_is_saved_as_eager_would(tmp_path):
    net, x = Plain(), torch.randn(1, 3, 8, 8)
    function = aot_compiled(net, x)
    function.save_compiled_function(str(tmp_path / "net.bin"))
    with open(tmp_path / "net.bin", "rb") as file, torch.no_grad():
        assert torch.equal(torch.compiler.load_compiled_function(file)(net, x), net(x))


def test_a_pytorch_that_cannot_save_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo.aot_compile_types", None)
    monkeypatch.delitem(sys.modules, "sf_compile.saved", raising=False)
    monkeypatch.setattr("sf_compile.backend._will_be_saved", lambda: True)
    with pytest.raises(Exception, match=r"saving a compiled function needs PyTorch 2\.13 or later"):
        torch.compile(TransformerNet(4, 1).eval(), backend=styleforge)(torch.rand(1, 3, 16, 16))
