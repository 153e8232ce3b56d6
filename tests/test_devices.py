"""Models on the second GPU, or with a part on the CPU: each call runs where its tensors are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from networks import Net, block, reflect
from test_semantics import Counting
from torch import Tensor, nn

from sf_compile.backend import styleforge
from sf_compile.models import TransformerNet

pytestmark = pytest.mark.gpu


@pytest.fixture
def second():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda:1")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_model_on_the_second_gpu(second, dtype, strict_float32):
    model = TransformerNet(16).eval().to(second, dtype)
    x = (torch.rand(1, 3, 96, 72, device=second) * 255).to(dtype)
    compiled = torch.compile(model, backend=styleforge)
    with torch.no_grad():
        exact = TransformerNet(16).eval().to(second, torch.float64)
        exact.load_state_dict(model.state_dict())
        wanted = exact(x.double())
        allowed = 1.25 * relative_error(model(x), wanted) + torch.finfo(dtype).eps
        for _ in range(3):  # one by one, recorded, replayed
            out = compiled(x)
            assert out.device == second and torch.cuda.current_device() == 0
            assert relative_error(out, wanted) <= allowed
        # The same compiled model, moved.
        model.to("cuda:0")
        out = compiled(x.to("cuda:0"))
        assert out.device.index == 0 and relative_error(out.to(second), wanted) <= allowed


def activated(m: Net, x: Tensor) -> Tensor:
    return F.relu(m.norm(m.conv(reflect(x))))


class Parts(nn.Module):
    """Its first half runs on a CPU, its second on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Net(activated), Net(block).cuda()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).cuda())


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_model_of_which_a_part_is_on_the_cpu(grad, strict_float32):
    model, x, counting = Parts(), torch.randn(2, 4, 12, 10), Counting()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    with torch.set_grad_enabled(grad):
        ours, theirs = compiled(x), model(x)
        assert ours.device == theirs.device and relative_error(ours, theirs) < 2e-5
        assert counting.ours == [2 + 3]
        if grad:
            weights = list(model.parameters())
            mine, others = (
                torch.autograd.grad(out.pow(3).sum(), weights, allow_unused=True) for out in (ours, theirs)
            )
            largest = max(float(g.norm()) for g in others if g is not None)
            for a, b in zip(mine, others, strict=True):
                assert (a is None) == (b is None)
                assert a is None or float((a - b).norm()) <= 1e-3 * largest
