"""The ops of the ``styleforge`` namespace; importing this package registers them.

Each op is one file: schema, checks, fake kernel, gradient. ``reference`` says in plain PyTorch
what they compute. They can be called directly (``torch.ops.styleforge.instance_norm(...)``), with
no compiler involved.
"""

from sf_compile.ops.blocks import conv_instance_norm, conv_reflection_pad, residual_block
from sf_compile.ops.conv2d import conv2d
from sf_compile.ops.instance_norm import instance_norm
from sf_compile.ops.instance_statistics import instance_statistics
from sf_compile.ops.norm_statistics import norm_statistics
from sf_compile.ops.normalize import normalize
from sf_compile.ops.picture_to_float import picture_to_float
from sf_compile.ops.picture_to_uint8 import picture_to_uint8
from sf_compile.ops.residual_trunk import residual_trunk

__all__ = [
    "conv2d",
    "conv_instance_norm",
    "conv_reflection_pad",
    "instance_norm",
    "instance_statistics",
    "norm_statistics",
    "normalize",
    "picture_to_float",
    "picture_to_uint8",
    "residual_block",
    "residual_trunk",
]
