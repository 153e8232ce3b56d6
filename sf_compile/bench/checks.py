"""Correct first: no peer is timed before its output was compared with float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sf_compile import tf32
from sf_compile.bench.rows import BenchmarkError
from sf_compile.bench.work import Size
from sf_compile.models import MIN_SIDE
from sf_compile.runtime.calibration import psnr

# The package's promise: at most this many times eager's own error in the same precision.
STYLEFORGE_FACTOR = 1.25
# Another peer may round differently (another algorithm, TF32 or not); this finds a wrong one.
PEER_FACTOR = 10.0
# Eager beyond this is not a reference for anything.
EAGER_LIMIT = 0.1
STYLEFORGE_EPSILON = 1e-6
PEER_EPSILON = 1e-5


def check_sizes(sizes: Sequence[Size]) -> None:
    """Refuse pictures that TransformerNet cannot take.

    Raises:
        BenchmarkError: a side is below `MIN_SIDE`.
    """
    for size in sizes:
        if min(size.height, size.width) < MIN_SIDE:
            raise BenchmarkError(
                f"{size} is too small: TransformerNet needs sides of at least {MIN_SIDE} pixels"
            )


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Return ||output - reference|| / ||reference|| in float64, a NaN in either gives NaN."""
    reference = reference.double()
    return float(torch.linalg.vector_norm(output.double() - reference) / torch.linalg.vector_norm(reference))


def run_in_tf32(model: nn.Module, picture: Tensor) -> Tensor:
    """What float32 ``model`` makes of ``picture`` where every convolution's operands are rounded to TF32."""
    rounding = copy.deepcopy(model)
    for module in rounding.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data = tf32.rounded(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (tf32.rounded(inputs[0]),))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return rounding(picture)


def check_psnr(peer: str, output: Tensor, plain: Tensor, least: float, where: str) -> float:
    """Compare what `peer` returned with 8-bit integers with what it returns without; return the dB.

    Raises:
        BenchmarkError: fewer than `least`, or the same numbers: then no integers were multiplied.
    """
    found = psnr(plain, output)
    if found == math.inf:
        raise BenchmarkError(f"{where}: {peer} in int8 is what it is in fp16: it multiplies no integers here")
    if found < least:
        raise BenchmarkError(
            f"{where}: {peer} in int8 comes to {found:.1f} dB from fp16, {least:g} are promised; nothing was "
            "timed after it"
        )
    return found


def check_output(
    peer: str, output: Tensor, reference: Tensor, eager_error: float, where: str, slack: float = 0.0
) -> float:
    """Compare what `peer` returned with float64 and return its relative error; `slack`: `check_error`.

    Raises:
        BenchmarkError: another shape, or an error that :func:`check_error` does not allow.
    """
    if output.shape != reference.shape:
        raise BenchmarkError(
            f"{where}: {peer} returns a wrong shape {tuple(output.shape)}, expected {tuple(reference.shape)}"
        )
    error = relative_error(output, reference)
    check_error(peer, error, eager_error, where, slack)
    return error


def check_error(peer: str, error: float, eager_error: float, where: str, slack: float = 0.0) -> None:
    """Stop the benchmark where `peer` computes something else than eager does.

    Args:
        peer: ``peer`` of its rows.
        error: its relative error against float64.
        eager_error: eager's, in the same dtype and on the same input.
        where: what was computed, for the message.
        slack: more that is allowed; for a single layer, where eager's own error is that of one rounding.

    Raises:
        BenchmarkError: the error is above the limit, or is NaN.
    """
    # `not <=` rather than `>`: a NaN fails every comparison and so never passes.
    if not eager_error <= EAGER_LIMIT:
        raise BenchmarkError(
            f"{where}: eager itself is {eager_error:.3g} from float64, nothing can be compared"
        )
    if peer.startswith("styleforge"):
        limit = STYLEFORGE_FACTOR * eager_error + STYLEFORGE_EPSILON
    else:
        limit = PEER_FACTOR * eager_error + PEER_EPSILON
    limit += slack
    if not error <= limit:
        raise BenchmarkError(
            f"{where}: {peer} computes a wrong result: relative error {error:.3g} against float64, "
            f"allowed {limit:.3g} (eager's own is {eager_error:.3g}); nothing was timed after it"
        )
