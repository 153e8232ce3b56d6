"""``FusedInstanceNorm2d``: nn.InstanceNorm2d with an activation and a residual in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sf_compile.ops  # noqa: F401  registers the ops
from sf_compile.activations import parse
from sf_compile.ops.reference import activate_


class FusedInstanceNorm2d(nn.InstanceNorm2d):
    """A drop-in for ``nn.InstanceNorm2d``: same arguments, same state_dict, same result.

    ``forward(input, residual=None)`` returns ``activation(norm(input)) + residual`` for input (N, C, H, W) in
    float16, bfloat16, float32 or float64; statistics are float32 (float64 for float64). A channels_last input
    gives a channels_last output, any other a contiguous one.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in nn.InstanceNorm2d.
        activation: as in ``sf_compile.activations``, such as ``"relu"`` or ``"leaky_relu(0.2)"``.

    Raises:
        ValueError: for an unknown activation; for a single pixel per channel when the statistics are the
            picture's own, as nn.InstanceNorm2d does.
    """

    def __init__(self, num_features: int, *args: Any, activation: str = "none", **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        try:
            parse(activation)
        except ValueError as error:
            raise ValueError(f"activation must be {error}") from None
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input)) + residual; ``residual`` has the shape and dtype of ``input``."""
        channels_last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
        channels_last = channels_last and not input.is_contiguous()
        running = self.track_running_stats and self.running_mean is not None
        if (self.training and running) or input.dim() != 4:
            # PyTorch updates the running statistics; what follows the norm is one pass of ours.
            out = super().forward(input)
            if input.dim() != 4:
                out = activate_(out, self.activation)
                return out if residual is None else out + residual
            return torch.ops.styleforge.normalize(
                out, None, None, None, None, self.eps, self.activation, residual, channels_last
            )
        if running:
            return torch.ops.styleforge.normalize(
                input, self.running_mean, self.running_var, self.weight, self.bias, self.eps, self.activation,
                residual, channels_last,
            )  # fmt: skip
        if input.shape[2] * input.shape[3] == 1:
            raise ValueError(
                f"Expected more than 1 spatial element when training, got input size {input.shape}"
            )
        return torch.ops.styleforge.instance_norm(
            input, self.weight, self.bias, self.eps, self.activation, residual, channels_last
        )

    def extra_repr(self) -> str:
        """As nn.InstanceNorm2d's, and the activation."""
        return f"{super().extra_repr()}, activation={self.activation!r}"
