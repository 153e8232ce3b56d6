"""Modules over the fused ops, for people who want them without the compiler."""

from sf_compile.nn.fused_instance_norm import FusedInstanceNorm2d

__all__ = ["FusedInstanceNorm2d"]
