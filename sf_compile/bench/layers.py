"""Suite ``layers``: every kind of convolution in TransformerNet by itself, beside cuDNN's bare one.

``styleforge`` is ``styleforge::conv2d`` with the arguments that it has in the rewritten network: the norm,
the activation and the addition on the way in, upsampling and padding, and the statistics and the kept copy
on the way out are all in its time. ``cudnn`` is PyTorch's convolution (on a GPU cuDNN's, with the algorithm
that it finds fastest) of an input that is finished, upsampled and padded already, in the layout that the
network has between its layers: what it leaves out would cost it more passes.

Both are timed as :mod:`sf_compile.bench.replays` says, in the same rounds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_compile import tf32
from sf_compile.bench.ceilings import Ceilings, measure_ceilings
from sf_compile.bench.checks import check_output, check_sizes, relative_error
from sf_compile.bench.layer_operands import Case, Operands, exact, finish, operands, prepare
from sf_compile.bench.replays import calls_in_replay, repeated, rotating_sets
from sf_compile.bench.rows import BenchmarkError, Keep, Log, Row, dtype_name, environment_of, forget, rounded
from sf_compile.bench.timing import Budget, Sample, interleaved, sustained
from sf_compile.bench.work import Size, parse_sizes, transformer_net_layers
from sf_compile.cuda import convolution, halo_conv, mma_conv
from sf_compile.ops.conv2d import conv2d as fused_conv2d
from sf_compile.ops.conv2d_arguments import Arguments

GPU_SIZES = parse_sizes("512x512,1080x1920,2160x3840")
CPU_SIZES = parse_sizes("64x64")
PEERS = ("styleforge", "cudnn")


def select_peers(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the peers called `names`, or, for None, both.

    Raises:
        BenchmarkError: a name is unknown to this suite.
    """
    for name in names or ():
        if name not in PEERS:
            raise BenchmarkError(f"suite layers has no peer {name!r}; choose from {', '.join(PEERS)}")
    return PEERS if names is None else tuple(dict.fromkeys(names))


def run_layers(
    sizes: Sequence[Size],
    dtypes: Sequence[torch.dtype],
    peers: Sequence[str],
    device: torch.device,
    *,
    budget: Budget,
    hot: float = 0.0,
    quick: bool = False,
    log: Log,
    keep: Keep = forget,
) -> list[Row]:
    """Check and time `peers` on every kind of layer that pictures of `sizes` meet; one row each.

    `hot` are seconds of uninterrupted load for an additional row per peer, 0 for none; `quick` measures the
    ceilings on small operands; `keep` receives all rows so far whenever a layer is done.

    Raises:
        BenchmarkError: a picture is too small for the network, or a result is wrong.
    """
    check_sizes(sizes)
    environment = environment_of(device)
    rows: list[Row] = []
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), on_device:
        ceilings = measure_ceilings(device, tuple(dtypes), quick=quick)
        log(str(ceilings))
        for size in sizes:
            # By name: the residual blocks repeat themselves.
            layers = {layer.name: layer for layer in transformer_net_layers(size)}
            for dtype in dtypes:
                # As the backend plans it: float32 without TF32 keeps the layout of the picture.
                channels_last = not (device.type == "cuda" and dtype == torch.float32) or tf32.allowed("auto")
                for layer in layers.values():
                    case = Case(layer, size, dtype, channels_last)
                    log(str(case))
                    measured = _run_case(case, peers, device, budget, hot, ceilings)
                    rows += [vars(environment) | row for row in measured]
                    keep(rows)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
    return rows


def _run_case(
    case: Case, peers: Sequence[str], device: torch.device, budget: Budget, hot: float, ceilings: Ceilings
) -> list[Row]:
    """Check, then time, the peers on one layer."""
    call_bytes = case.layer.fused_bytes(case.dtype.itemsize)
    sets = operands(case, device, rotating_sets(call_bytes, device))
    calls = calls_in_replay(len(sets), call_bytes, device)
    errors = _check(case, peers, sets[0])
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    runs = {name: repeated(_numbered(name, sets), len(sets), calls, pool) for name in peers}
    example = [sets[0].fused.input]
    samples = {("cool", name): sample for name, sample in interleaved(
        runs, dict.fromkeys(runs, example), budget).items()}  # fmt: skip
    if hot > 0:
        samples |= {("hot", name): sustained(run, example, hot) for name, run in runs.items()}
    return [
        _row(case, name, condition, sample, calls, sets[0], ceilings, errors[name])
        for (condition, name), sample in samples.items()
    ]


def _row(
    case: Case,
    peer: str,
    condition: str,
    sample: Sample,
    calls: int,
    one: Operands,
    ceilings: Ceilings,
    error: float,
) -> Row:
    """Put one peer's numbers into a row."""
    p20, median, p80 = (sample.percentile(q) * 1e3 / calls for q in (20, 50, 80))
    subpixel = peer == "styleforge" and _runs_subpixel(one.fused)
    kernel = _kernel_of(one.fused) if peer == "styleforge" else None
    flops = case.layer.flop(subpixel=subpixel)
    count = case.layer.fused_bytes if peer == "styleforge" else case.layer.bare_bytes
    tflops = flops / median / 1e6
    ceiling = ceilings.tflops[dtype_name(case.dtype)]
    mma = ceilings.mma_tflops.get(dtype_name(case.dtype))
    return {
        "layer": case.layer.name,
        "size": str(case.size),
        "shape": str(case.layer.input),
        "layout": "channels_last" if case.channels_last else "contiguous",
        "dtype": dtype_name(case.dtype),
        "peer": peer,
        "condition": condition,
        "median_us": rounded(median),
        "p20_us": rounded(p20),
        "p80_us": rounded(p80),
        "arithmetic": "subpixel" if subpixel else "direct",
        "flops": flops,
        "tflops": rounded(tflops),
        "bytes": count(case.dtype.itemsize),
        "ceiling_tflops": rounded(ceiling),
        "share_of_ceiling": rounded(tflops / ceiling),
        "copy_gbps": rounded(ceilings.copy_gbps),
        "kernel": kernel,
        "mma_tflops": rounded(mma),
        "share_of_mma": None if mma is None else rounded(tflops / mma),
        "error_vs_float64": rounded(error),
    }


def _check(case: Case, peers: Sequence[str], one: Operands) -> dict[str, float]:
    """Compare all results of `peers` with float64 and return the relative errors of their outputs."""
    a, where = one.fused, str(case)
    # A single layer's error is about that of one rounding: an eighth of it decides nothing.
    eps = torch.finfo(case.dtype).eps
    slack = eps / 8
    # Where TF32 is allowed, with float16's ten bits, one algorithm can use it and eager's be without it.
    ten_bits = case.dtype == torch.float32 and a.input.is_cuda and tf32.allowed("auto")
    unit = torch.finfo(torch.float16).eps if ten_bits else eps
    slack_of_output = unit if ten_bits else slack
    true, true_z = exact(a)
    z = finish(a)
    eager = F.conv2d(prepare(a, z), a.weight, a.bias, a.stride)
    eager_error = relative_error(eager, true)
    errors = {}
    for name in peers:
        if name == "cudnn":
            errors[name] = check_output(name, _bare(one), true, eager_error, where, slack_of_output)
            continue
        output, mean, variance, kept = fused_conv2d(*a)
        errors[name] = check_output(name, output, true, eager_error, where, slack_of_output)
        if a.keep_input:
            check_output(name, kept, true_z, relative_error(z, true_z), f"{where}, kept input", slack)
        if a.statistics:
            # The rounding of pixels averages out of them; that of the sums of weights in the sub-pixel form,
            # which eager does not have, stays.
            for found, sought, near, what in zip(
                (variance, mean), _moments(true), _moments(eager), ("variance", "mean"), strict=True
            ):
                check_output(f"{name}'s {what}", found, sought, relative_error(near, sought), where, unit)
    return errors


def _moments(x: Tensor) -> tuple[Tensor, ...]:
    """Variance and mean of every (image, channel) in float64."""
    return torch.var_mean(x.double(), (2, 3), correction=0)


def _bare(one: Operands) -> Tensor:
    """Convolve the prepared input."""
    with _fastest_algorithm():
        return torch.conv2d(one.prepared, one.weight, one.fused.bias, one.fused.stride)


def _numbered(peer: str, sets: Sequence[Operands]) -> Callable[[int], object]:
    """Return the peer as a function of the number of its input set."""
    if peer == "cudnn":
        return lambda number: _bare(sets[number])
    return lambda number: fused_conv2d(*sets[number].fused)


@contextlib.contextmanager
def _fastest_algorithm() -> Iterator[None]:
    """Let cuDNN measure its algorithms at the first call of a shape and take the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _runs_subpixel(a: Arguments) -> bool:
    """Whether a fused kernel runs `a` as the four small convolutions that it equals."""
    if a.upsample != 2 or not a.input.is_cuda:
        return False
    kernel = convolution.choice(a).kernel
    return kernel is halo_conv or (kernel is mma_conv and mma_conv.runs_subpixel(a))


def _kernel_of(a: Arguments) -> str | None:
    """What runs `a` on a GPU, in words; None on a CPU."""
    return str(convolution.choice(a)) if a.input.is_cuda else None
