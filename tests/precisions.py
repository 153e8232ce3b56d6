"""What the tests of precisions on a CPU share: dtypes, a small network, a backend that keeps its graphs."""

from __future__ import annotations

from typing import Any

import torch
from cases import relative_error
from torch import Tensor

from sf_compile.backend import styleforge
from sf_compile.models import TransformerNet

STORED = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Keeping:
    """The backend with ``options``; keeps the graphs that it rewrote."""

    def __init__(self, **options: Any) -> None:
        self.options, self.graphs = options, []

    def __call__(self, gm: Any, example_inputs: list[Any]) -> Any:
        return styleforge(gm, example_inputs, options={**self.options, "fallback": self.keep})

    def keep(self, gm: Any, example_inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        return gm.forward

    @property
    def calls(self) -> list[str]:
        """The functions that the last graph calls, but for what takes a result apart."""
        nodes = [n for n in self.graphs[-1].graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
        names = [getattr(n.target, "__name__", str(n.target)) for n in nodes]
        return [name for name in names if name != "getitem"]


def small_net() -> TransformerNet:
    return TransformerNet(width=8, blocks=2).eval()


def picture(height: int = 24, width: int = 20) -> Tensor:
    return torch.rand(1, 3, height, width) * 255


def assert_as_good(out: Tensor, like: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Of eager's dtype and strides, and as near as ``like``, what eager PyTorch makes in that precision."""
    assert (out.dtype, out.stride(), out.shape) == (eager.dtype, eager.stride(), eager.shape)
    rounding = relative_error(like.to(eager.dtype), exact)
    assert relative_error(out, exact) <= 1.25 * rounding + 16 * torch.finfo(torch.float64).eps
