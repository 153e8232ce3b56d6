"""The scales of ``precision="int8"``, from a call, and the layers that go back to float16 after all.

One call runs op by op in float16. Of each convolution that may multiply integers it takes the largest number
of its finished input, which becomes the largest integer: no number of this picture is cut off. Then the
picture with integers everywhere is compared with that of float16. While it is not close enough, the layer
which alone makes most of a difference goes back to float16.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sf_compile import ops
from sf_compile.ops import quantization
from sf_compile.ops.conv2d_arguments import Arguments

log = logging.getLogger(__name__)

Quantize = Callable[[Mapping[str, float]], fx.GraphModule]
"""From scales by the names of sites to a graph that computes with them."""


@dataclass(frozen=True)
class Calibration:
    """What one call settled.

    Attributes:
        scales: ``input_scale`` of the convolutions that multiply 8-bit integers, by the names of their sites.
        left: Why the others do not.
        psnr: How close, in dB, this call's results are to those of float16; infinite where they are the same.
        min_psnr: How close they had to be.
    """

    scales: Mapping[str, float]
    left: Mapping[str, str]
    psnr: float
    min_psnr: float

    def __str__(self) -> str:
        of = len(self.scales) + len(self.left)
        text = f"{len(self.scales)} of {of} convolutions multiply 8-bit integers"
        return f"{text}, {self.psnr:.1f} dB from float16's result ({self.min_psnr:g} asked)"


class NotTelling(Exception):
    """A call's numbers say nothing about those of others; the message says why."""


def calibrate(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    sites: Mapping[str, str | None],
    quantize: Quantize,
    min_psnr: float,
) -> Calibration:
    """Scales for ``gm``, a graph of ``styleforge`` ops without regions, from what it does with ``inputs``.

    ``sites`` are its convolutions by name, with the reason of those that stay as they are; ``quantize`` makes
    of ``gm`` a graph with scales.

    Raises:
        NotTelling: the results are constant or not finite.
    """
    left = {site: reason for site, reason in sites.items() if reason is not None}
    with torch.no_grad():
        observed = _Observed(gm, [site for site in sites if site not in left])
        wanted = _pictures(_undone(observed.run, inputs))
        _check(wanted)
        scales = dict(observed.scales)
        left.update(observed.refusals)

        def closeness(scales: Mapping[str, float]) -> float:
            """The least of the results' PSNR."""
            if not scales:
                return math.inf
            return min(map(psnr, wanted, _pictures(_undone(quantize(scales), inputs))))

        found = closeness(scales)
        if found < min_psnr:
            alone = {site: closeness({site: scale}) for site, scale in scales.items()}
            for site in sorted(scales, key=lambda site: (alone[site], site)):
                del scales[site]
                left[site] = f"it alone makes {alone[site]:.1f} dB"
                found = closeness(scales)
                log.debug("int8: %s goes back to float16, %.1f dB with the others", site, found)
                if found >= min_psnr:
                    break
    return Calibration(scales, left, found, min_psnr)


def _undone(run: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """What ``run`` returns, without what else it does: the call itself is yet to come.

    It may write into its inputs, a counting buffer for one, and draw random numbers: each run the same.
    """
    gpus = {x.device.index for x in inputs if isinstance(x, Tensor) and x.is_cuda}
    with torch.random.fork_rng(sorted(gpus)):
        return run(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))


class _Observed(fx.Interpreter):
    """Runs a graph and finds the scale of each of some convolutions, or why there is none."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[str]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self._sites = frozenset(sites)
        self.scales: dict[str, float] = {}
        self.refusals: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, as ``fx.Interpreter`` has it."""
        site = n.meta.get("sites", ("",))[0]
        if site in self._sites and n.target is torch.ops.styleforge.conv2d.default:
            self._observe(site, Arguments(*self.fetch_args_kwargs_from_env(n)[0]))
        return super().run_node(n)

    def _observe(self, site: str, a: Arguments) -> None:
        reason = quantization.refusal(a) or _device_refusal(a)
        if reason is None:
            z = ops.normalize(a.input, *a.norm, a.residual, a.channels_last, out_dtype=a.dtype)
            largest = float(z.abs().amax())
            dtype = quantization.input_dtype(a.activation, a.residual is not None)
            scale = largest / quantization.bound(dtype)
            if math.isfinite(scale) and scale > torch.finfo(torch.float32).tiny:
                self.scales[site] = scale
                return
            reason = f"the largest number of its input is {largest}"
        self.refusals[site] = reason


def _device_refusal(a: Arguments) -> str | None:
    """Why there is no kernel for ``a`` on its device; a CPU computes what kernels would."""
    if not a.input.is_cuda:
        return None
    from sf_compile.cuda import convolution

    return convolution.quantized_refusal(a)


def _pictures(results: Any) -> list[Tensor]:
    """The tensors of numbers that a graph returned."""
    several = results if isinstance(results, list | tuple) else [results]
    return [x for x in several if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def _check(pictures: Sequence[Tensor]) -> None:
    if not pictures:
        raise NotTelling("it returns no numbers")
    for x in pictures:
        if not bool(x.isfinite().all()):
            raise NotTelling("its result is not finite")
        if bool((x == x.flatten()[0]).all()):
            raise NotTelling("its result is constant")


def psnr(wanted: Tensor, found: Tensor) -> float:
    """10 log10(range^2 / mean square difference) in dB, where the range is that of ``wanted``.

    Infinite where both are the same; minus that where they differ and ``wanted`` is constant, or one of both
    is not finite.
    """
    difference = float((wanted.double() - found.double()).square().mean())
    if difference == 0:
        return math.inf
    extent = float(wanted.max()) - float(wanted.min())
    return 10 * math.log10(extent**2 / difference) if extent > 0 and difference < math.inf else -math.inf
