"""From what size on the pictures of a call are worth fusing on a CPU.

What Python does for a fused op takes longer than eager PyTorch's calls of the operations that it stands for,
and what the op saves grows with the picture. So a graph has a size at which both are equal, and a smaller
call runs as it came. The size follows from the plan and the number of threads alone: the same call runs the
same way in every process.

The numbers are fitted to what the networks of tests/architectures took, eager and fused, with pictures of 32
to 256 pixels on one core with AVX2; what a norm over groups saves, to AnimeGANv2 on two with AVX-512. Their
signs say what matters: a layer without a norm saves little but by its convolution's form, an op alone is
called through the dispatcher, and at the border to PyTorch's own operations pictures change their layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sf_compile.cpu.forms import is_winograd
from sf_compile.graph import spelling
from sf_compile.graph.plan import Decision
from sf_compile.graph.sites import Match
from sf_compile.graph.steps import ConvTranspose
from sf_compile.graph.values import value_of
from sf_compile.subpixel import is_subpixel

# Microseconds of a call beyond eager's, for each
_NORM, _BARE, _ALONE = 100.0, 180.0, 320.0  # site with a norm; site without; op that is in no region
_MARGIN = 1.25  # of the cost: a call that gains nothing had better keep eager's bits
# Microseconds saved for each thousand numbers of a site's raw output, with a norm (less with one over groups
# of channels, for which PyTorch has a kernel of its own) and without; lost for each thousand that enter from,
# and that leave to, PyTorch's operations; saved for each million products.
_SAVED_NORM, _SAVED_GROUPED, _SAVED_BARE = 8.1, 4.0, 4.0
_ENTERS, _LEAVES, _SAVED_PRODUCTS = 4.5, 8.6, 21.0


@dataclass(frozen=True)
class BreakEven:
    """Of one graph: ``numbers`` of the pictures among its inputs, those at ``pictures``, with one thread.

    ``numbers`` is infinite where nothing is saved at any size.
    """

    numbers: float
    pictures: tuple[int, ...]

    def is_reached(self, inputs: Sequence[Any]) -> bool:
        """Whether a call with these inputs is worth fusing."""
        return sum(inputs[i].numel() for i in self.pictures) >= self.numbers * torch.get_num_threads()

    def __str__(self) -> str:
        threads = torch.get_num_threads()
        on = f"on this CPU's {threads} threads"
        if math.isinf(self.numbers):
            return f"{on} nothing is saved by fusing it, and it runs as it came"
        least = math.ceil(self.numbers * threads)
        return f"{on} calls of less than {least} numbers in pictures run as they came"


class LargeEnough:
    """Calls ``fused`` where that is worth it, else ``plain``, which computes the same."""

    def __init__(self, fused: Callable[..., Any], plain: Callable[..., Any], least: BreakEven) -> None:
        self.__self__ = getattr(fused, "__self__", None)  # the rewritten graph, as ``fused`` has it
        self.fused, self._plain, self._least = fused, plain, least

    def __call__(self, *inputs: Any) -> Any:
        """What the graph returns."""
        return (self.fused if self._least.is_reached(inputs) else self._plain)(*inputs)


def break_even(
    graph: fx.Graph, decisions: Sequence[Decision], fixed: frozenset[int], alone: int
) -> BreakEven | None:
    """That of a graph as Dynamo gave it, of whose plan are ``decisions``.

    ``fixed`` are the inputs that are no pictures, parameters and buffers; ``alone`` is how many ops run in no
    region. None where it is not known: on another device, in another dtype than float32, without a picture.
    """
    values = [value_of(node) for node in graph.nodes if node.op == "placeholder"]
    pictures = tuple(
        i for i, x in enumerate(values) if isinstance(x, Tensor) and x.dim() == 4 and i not in fixed
    )
    anchors = [value_of(decision.site.anchor) for decision in decisions]
    if not pictures or any(x.device.type != "cpu" or x.dtype != torch.float32 for x in anchors):
        return None
    made = {decision.site.output for decision in decisions}
    cost, saved = _ALONE * alone, 0.0
    for decision, raw in zip(decisions, anchors, strict=True):
        site = decision.site
        cost += _BARE if site.norm is None else _NORM
        saved += _saved(site) * _thousands(raw)
        if site.input not in made:
            saved -= _ENTERS * _thousands(value_of(site.input))
        if not decision.channels_last:
            saved -= _LEAVES * _thousands(value_of(site.output))
        saved += _SAVED_PRODUCTS * _products(site, raw) / 1e6
    numbers = sum(map(_numel, (values[i] for i in pictures)))
    return BreakEven(math.inf if saved <= 0 else _MARGIN * cost / saved * numbers, pictures)


def _saved(site: Match) -> float:
    if site.norm is None:
        return _SAVED_BARE
    by_pytorch = site.norm.node.target in (spelling.GROUP_NORM, spelling.LAYER_NORM)
    return _SAVED_GROUPED if by_pytorch and site.norm.groups is not None else _SAVED_NORM


def _products(site: Match, raw: Tensor) -> float:
    """Of its convolution, if that is computed in a form with fewer of them; else none."""
    conv = site.conv
    if conv is None or isinstance(conv, ConvTranspose):
        return 0.0
    weight = value_of(conv.weight)
    if not isinstance(weight, torch.nn.Parameter):
        return 0.0  # brought into the form in every call
    out, channels, height, width = weight.shape
    pads = site.pad.padding if site.pad is not None else (0, 0, 0, 0)
    vertical, horizontal = conv.padding
    padding = tuple(a + b for a, b in zip(pads, (horizontal, horizontal, vertical, vertical), strict=True))
    factor = site.upsample.factor if site.upsample is not None else 1
    kernel, stride = (height, width), tuple(conv.stride)
    if is_subpixel(kernel, stride, factor, padding) or is_winograd(kernel, stride, channels, out):
        return float(_numel(raw) * channels * height * width)
    return 0.0


def _numel(x: Tensor) -> int:
    return math.prod(map(_hint, x.shape))


def _hint(size: Any) -> int:
    """A size; of a symbolic one what it was when the graph was captured, without a guard."""
    return int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)


def _thousands(x: Tensor) -> float:
    return _numel(x) / 1e3
