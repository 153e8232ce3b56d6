"""Programs that eager PyTorch runs and a fused graph once got wrong; one test each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import relative_error
from torch import nn

from sf_compile.backend import styleforge


class AddIntoTransposedStrides(nn.Module):
    """The sum takes its strides from the transposed operand; a later view depends on them."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = residual.transpose(2, 3) + F.instance_norm(x)
        return y.transpose(2, 3).view(2, -1)


class GradEnabledInside(nn.Module):
    """Called under no_grad, it records gradients all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return F.instance_norm(self.conv(x)).relu()


class WrittenAfterwards(nn.Module):
    """The result of a convolution is written to, which its gradient does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y[:, :1] *= 2
        return y


class OneChannel(nn.Module):
    """The strides of its one channel tell the next convolution which layout to take."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 1, 3, padding=1, padding_mode="reflect")
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x)


def test_a_result_that_is_written_to_has_its_gradient():
    model, x = WrittenAfterwards(), torch.randn(1, 3, 8, 8)
    ours = torch.autograd.grad(torch.compile(model, backend=styleforge)(x).sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, expected, strict=True))


def test_one_channel_has_the_strides_that_eager_gives_it():
    model, x = OneChannel(), torch.randn(2, 4, 7, 12)
    with torch.no_grad():
        ours, expected = torch.compile(model, backend=styleforge)(x), model(x)
    assert expected.stride(1) == 1 and ours.stride() == expected.stride()


def test_an_addition_keeps_the_strides_that_eager_gives_it():
    model, x, residual = AddIntoTransposedStrides(), torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    ours = torch.compile(model, backend=styleforge)(x, residual)
    assert relative_error(ours, model(x, residual)) < 1e-5


def test_torch_func_grad_of_a_network_that_would_fuse():
    x = torch.randn(2, 3, 8, 8)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.instance_norm(F.conv2d(padded, weight)).relu().pow(3).sum()

    weight = torch.randn(4, 3, 3, 3)
    ours = torch.compile(torch.func.grad(loss), backend=styleforge)(weight)
    assert relative_error(ours, torch.func.grad(loss)(weight)) < 1e-5


def test_a_bias_in_front_of_a_norm_has_a_gradient_where_grad_is_switched_on_inside():
    model, x = GradEnabledInside(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        out = torch.compile(model, backend=styleforge)(x)
    out.sum().backward()
    assert model.conv.bias.grad is not None and model.conv.bias.grad.abs().max() < 1e-4
