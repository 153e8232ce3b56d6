"""What a layer of suite ``layers`` is given, and what it computes in PyTorch's own operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sf_compile.bench.rows import dtype_name
from sf_compile.bench.work import Layer, Size
from sf_compile.ops.conv2d_arguments import Arguments

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One thing to time: everything but the peer. `channels_last` is the layout between layers."""

    layer: Layer
    size: Size
    dtype: torch.dtype
    channels_last: bool

    def __str__(self) -> str:
        return f"layer {self.layer.name} of {self.size} {dtype_name(self.dtype)}"

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout between layers, in PyTorch's words."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Operands:
    """One input set: the fused op's arguments, and input and weight of the bare convolution."""

    fused: Arguments
    prepared: Tensor
    weight: Tensor


def operands(case: Case, device: torch.device, count: int) -> list[Operands]:
    """Draw `count` input sets: pictures of 0..255 for the first layer, else raw maps off zero mean.

    They share the weight, a parameter as in a network, for which the kernels keep a packed copy.
    """
    layer = case.layer
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        form = case.memory_format if len(shape) == 4 else torch.contiguous_format
        out = torch.empty(shape, device=device, dtype=case.dtype, memory_format=form)
        return out.normal_(mean, deviation, generator=generator)

    def one() -> Operands:
        mean = variance = None
        if layer.norm:
            input = normal(*layer.input, mean=1.0, deviation=2.0)
            # In float32, as the op takes them, a picture at a time to bound the memory.
            statistics = [torch.var_mean(part.float(), (2, 3), correction=0) for part in input.split(1)]
            variance, mean = (torch.cat(parts) for parts in zip(*statistics, strict=True))
        else:
            input = torch.rand(layer.input, generator=generator, device=device).mul(255).to(case.dtype)
        border = layer.kernel // 2
        fused = Arguments(
            input, weight, bias, mean, variance, gamma, beta, EPS if layer.norm else 1.0,
            "relu" if layer.relu else "none", normal(*layer.input) if layer.residual else None,
            layer.upsample, [border] * 4, "reflect", [layer.stride] * 2, "none", layer.statistics, layer.keep,
            case.channels_last and layer.statistics,
        )  # fmt: skip
        prepared = prepare(fused, finish(fused)).contiguous(memory_format=case.memory_format)
        return Operands(fused, prepared, weight.contiguous(memory_format=case.memory_format))

    fan_in = layer.input.c * layer.kernel**2
    shape = (layer.out_channels, layer.input.c, layer.kernel, layer.kernel)
    weight = nn.Parameter(normal(*shape, deviation=fan_in**-0.5).contiguous())
    bias = None if layer.statistics else normal(layer.out_channels)
    gamma = normal(layer.input.c, mean=1.0, deviation=0.2) if layer.norm else None
    beta = normal(layer.input.c, mean=0.2, deviation=0.3) if layer.norm else None
    return [one() for _ in range(count)]


def finish(a: Arguments) -> Tensor:
    """Return act(instance_norm(input)) + residual in PyTorch's own operations."""
    z = a.input
    if a.mean is not None:
        z = F.instance_norm(z, weight=a.norm_weight, bias=a.norm_bias, eps=a.eps)
    if a.activation == "relu":
        z = F.relu(z)
    return z if a.residual is None else z + a.residual


def prepare(a: Arguments, z: Tensor) -> Tensor:
    """Return `z` upsampled and padded by PyTorch's own operations."""
    if a.upsample > 1:
        z = F.interpolate(z, scale_factor=a.upsample, mode="nearest")
    return F.pad(z, a.padding, mode="reflect")


def exact(a: Arguments) -> tuple[Tensor, Tensor]:
    """Compute output and finished input in float64, a picture at a time."""

    def double(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.double()

    outputs, finished = [], []
    for number in range(a.input.shape[0]):
        one = slice(number, number + 1)
        residual = None if a.residual is None else a.residual[one]
        z = finish(
            a._replace(
                input=a.input[one].double(),
                residual=double(residual),
                norm_weight=double(a.norm_weight),
                norm_bias=double(a.norm_bias),
            )
        )
        outputs.append(F.conv2d(prepare(a, z), a.weight.double(), double(a.bias), a.stride))
        finished.append(z)
    return torch.cat(outputs), torch.cat(finished)
