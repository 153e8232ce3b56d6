"""Suite ``network``: TransformerNet, or the network in a checkpoint, end to end, by every peer.

For each size and dtype: build all peers, compare each with a float64 run of the same weights and
input, time them interleaved, free everything. Weights are the checkpoint's, or random with a fixed seed,
cast to the dtype; inputs are uniform in 0..255, as pictures are, and rotate. All peers run under
``torch.no_grad()``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor, nn

from sf_compile import tf32
from sf_compile.bench.building import Built, build, ready
from sf_compile.bench.ceilings import Ceilings, kernels_of, measure_ceilings
from sf_compile.bench.checks import check_output, check_psnr, check_sizes, relative_error, run_in_tf32
from sf_compile.bench.peers import PEERS, Build, Peer, styleforge, switches
from sf_compile.bench.rows import BenchmarkError, Keep, Log, Row, dtype_name, environment_of, forget, rounded
from sf_compile.bench.subject import SEED, Subject
from sf_compile.bench.timing import Budget, Call, Sample, interleaved, sustained
from sf_compile.bench.work import Size, parse_sizes
from sf_compile.options import Options

GPU_SIZES = parse_sizes("512x512,1080x1920,2160x3840,8x512x512")
CPU_SIZES = parse_sizes("128x128,384x384")
ROTATING_INPUTS = 4


@dataclass(frozen=True)
class Runner:
    """One peer ready to be timed at one size and dtype."""

    peer: Peer
    built: Built
    call: Call
    inputs: Sequence[Tensor]
    peak_mb: float | None
    error: float
    psnr: float | None = None


def select_peers(names: Sequence[str] | None, device: torch.device, log: Log) -> list[Peer]:
    """Return the peers called `names`, or, for None, all that can run on `device`.

    Raises:
        BenchmarkError: a name is unknown, or a named peer cannot run here.
    """
    if names is None:
        for peer in PEERS.values():
            if (reason := peer.missing(device)) is not None:
                log(f"without {peer.name}: {reason}")
        return [peer for peer in PEERS.values() if peer.missing(device) is None]
    for name in names:
        if name not in PEERS:
            raise BenchmarkError(f"no peer is called {name!r}; choose from {', '.join(PEERS)}")
        if (reason := PEERS[name].missing(device)) is not None:
            raise BenchmarkError(f"peer {name} cannot run on {device}: {reason}")
    return [PEERS[name] for name in dict.fromkeys(names)]


def run_network(
    sizes: Sequence[Size],
    dtypes: Sequence[torch.dtype],
    peers: Sequence[Peer],
    device: torch.device,
    *,
    subject: Subject,
    budget: Budget,
    hot: float = 0.0,
    quick: bool = False,
    log: Log,
    keep: Keep = forget,
) -> list[Row]:
    """Check and time `peers` on `device` and return one row each for every size and dtype.

    Args:
        sizes: input pictures.
        dtypes: floating dtypes of weights and input.
        peers: what to compare, in the order of the rows.
        device: a CUDA device or the CPU.
        subject: the network.
        budget: how long to measure each.
        hot: seconds of uninterrupted load for an additional row per peer; 0 for none.
        quick: measure the ceilings on small operands.
        log: receives one line of progress at a time.
        keep: receives all rows so far whenever a size and dtype is done.

    Raises:
        BenchmarkError: a picture is too small for the network, or a peer's output is wrong.
    """
    check_sizes(sizes)
    environment = environment_of(device)
    rows: list[Row] = []
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    # A peer compiled anew for every size and dtype is what is wanted here, not a mistake to give up on.
    unlimited = torch._dynamo.config.patch(recompile_limit=64)
    with (
        torch.no_grad(),
        on_device,
        unlimited,
        switches(peers),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches,
    ):
        computed = dict.fromkeys(peer.computes_in(dtype) for dtype in dtypes for peer in peers)
        built: set[torch.dtype] = set()
        ceilings = measure_ceilings(device, tuple(dict.fromkeys((*dtypes, *computed))), quick=quick)
        log(str(ceilings))
        for size in sizes:
            for dtype in dtypes:
                where = f"{size} {dtype_name(dtype)}"
                log(f"{where}: building {len(peers)} peers")
                unloaded = _unloaded(peers, dtype, device, built)
                runners = _runners(
                    subject.model, size, dtype, peers, device, Path(caches), unloaded, where, log
                )
                common = {
                    **vars(environment),
                    **subject.row(),
                    **size._asdict(),
                    "dtype": dtype_name(dtype),
                    "tf32": tf32.allowed("auto") if device.type == "cuda" else None,
                    "flop": subject.flop(size),
                }
                rows += _time(runners, size, dtype, ceilings, budget, hot, common, log)
                keep(rows)
                del runners
                _free(device)
    return rows


def _unloaded(
    peers: Sequence[Peer], dtype: torch.dtype, device: torch.device, built: set[torch.dtype]
) -> bool:
    """Whether none of styleforge's `peers` finds kernels loaded that another of this run has loaded before.

    `built` are the dtypes that were computed in so far, to which theirs are added. On a CPU one library
    has the kernels of all.
    """
    ours = [peer for peer in peers if peer.row_name == "styleforge"]
    computed = {peer.computes_in(dtype) for peer in ours}
    loaded = bool(built) if device.type == "cpu" else not built.isdisjoint(computed)
    built |= computed
    return not loaded and len({peer.precision for peer in ours}) <= 1


def _runners(
    network: nn.Module,
    size: Size,
    dtype: torch.dtype,
    peers: Sequence[Peer],
    device: torch.device,
    caches: Path,
    unloaded: bool,
    where: str,
    log: Log,
) -> list[Runner]:
    """Build and check `peers`; in their order."""
    model = copy.deepcopy(network).to(device, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        pictures = [
            (torch.rand(size.batch, 3, *size[1:]) * 255).to(device, dtype) for _ in range(ROTATING_INPUTS)
        ]
    nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    models = {"contiguous": model, "channels_last": nhwc}
    inputs = {
        "contiguous": pictures,
        "channels_last": [picture.contiguous(memory_format=torch.channels_last) for picture in pictures],
    }
    reference = _reference(model, pictures[-1])
    # Eager's own, in what a peer computes in: a model of that dtype, its result rounded to this one.
    eager_errors = {
        each: relative_error(copy.deepcopy(model).to(each)(pictures[-1].to(each)).to(dtype), reference)
        for each in dict.fromkeys(peer.computes_in(dtype) for peer in peers)
    }
    if torch.float32 in eager_errors and device.type == "cuda" and tf32.allowed("auto"):
        # Of TF32 throughout: which of eager's convolutions use it is cuDNN's choice.
        in_tf32 = run_in_tf32(copy.deepcopy(model).float(), pictures[-1].float()).to(dtype)
        eager_errors[torch.float32] = max(eager_errors[torch.float32], relative_error(in_tf32, reference))

    built: dict[tuple[Build, str], Built] = {}
    runners: dict[str, Runner] = {}
    # styleforge first: its warm compilation resets Dynamo, which forgets what others have compiled. Of
    # several precisions all but the last are forgotten so: what is not captured is called once more below.
    for peer in sorted(peers, key=lambda peer: peer.row_name != "styleforge"):
        layout = peer.layout(dtype)
        example = inputs[layout][0]
        key = (peer.build, layout)
        if key not in built:
            built[key] = build(peer, models[layout], example, caches, unloaded=unloaded)
            if built[key].compile_cold_s is not None:
                log(f"{where}: {peer.name} compiled in {built[key].compile_cold_s:.1f} s")
        call, peak_mb = ready(peer, built[key].call, example)
        allowed = eager_errors[peer.computes_in(dtype)]
        output, psnr = call(inputs[layout][-1]), None
        if peer.precision == "int8":
            # Its promise is how close it comes to fp16, whose promise is the other; on a picture that its
            # scales are not of.
            plain = styleforge(models[layout], "fp16")(inputs[layout][-1])
            check_output(peer.name, plain, reference, allowed, where)
            psnr = check_psnr(peer.name, output, plain, Options().min_psnr, where)
            error = relative_error(output, reference)
        else:
            error = check_output(peer.name, output, reference, allowed, where)
        runners[peer.name] = Runner(peer, built[key], call, inputs[layout], peak_mb, error, psnr)
    for runner in runners.values():
        if runner.peer.compiles and not runner.peer.graphs:
            runner.call(runner.inputs[0])
    return [runners[peer.name] for peer in peers]


def _reference(model: nn.Module, picture: Tensor) -> Tensor:
    """Run the same weights and input in float64, a picture at a time to bound the memory."""
    exact = copy.deepcopy(model).double()
    return torch.cat([exact(one.double()) for one in picture.split(1)])


def _time(
    runners: Sequence[Runner],
    size: Size,
    dtype: torch.dtype,
    ceilings: Ceilings,
    budget: Budget,
    hot: float,
    common: Row,
    log: Log,
) -> list[Row]:
    """Time the runners cool, then hot where asked, and return their rows."""
    common = {**common, "copy_gbps": rounded(ceilings.copy_gbps)}
    cool = interleaved(
        {runner.peer.name: runner.call for runner in runners},
        {runner.peer.name: runner.inputs for runner in runners},
        budget,
    )
    rows = [_row(runner, cool[runner.peer.name], "cool", dtype, ceilings, common) for runner in runners]
    if hot > 0:
        for runner in runners:
            log(f"{size} {dtype_name(dtype)}: {runner.peer.name} hot for {hot:g} s")
            sample = sustained(runner.call, runner.inputs, hot)
            rows.append(_row(runner, sample, "hot", dtype, ceilings, common))
    return rows


def _row(
    runner: Runner, sample: Sample, condition: str, dtype: torch.dtype, ceilings: Ceilings, common: Row
) -> Row:
    """Put one runner's numbers into a row."""
    computes_in = dtype_name(runner.peer.computes_in(dtype))
    ceiling, mma = ceilings.tflops[computes_in], ceilings.mma_tflops.get(computes_in)
    shared = dict(common)
    flop = shared.pop("flop")
    median = sample.percentile(50)
    ours = runner.peer.row_name == "styleforge"
    return {
        **shared,
        "floor_ms": rounded(flop / ceiling / 1e9),
        "ceiling_tflops": rounded(ceiling),
        "kernels": kernels_of(runner.inputs[0].device) if ours else None,
        "mma_tflops": rounded(mma),
        "share_of_mma": None if mma is None else rounded(flop / median / mma / 1e9),
        "peer": runner.peer.row_name,
        "precision": runner.peer.precision,
        "graphs": runner.peer.graphs,
        "layout": runner.peer.layout(dtype),
        "condition": condition,
        "median_ms": rounded(median),
        "p20_ms": rounded(sample.percentile(20)),
        "p80_ms": rounded(sample.percentile(80)),
        "back_to_back_ms": rounded(sample.back_to_back),
        "host_us": rounded(sample.host_us),
        "peak_mb": rounded(runner.peak_mb),
        "compile_cold_s": rounded(runner.built.compile_cold_s),
        "compile_warm_s": rounded(runner.built.compile_warm_s),
        "kernels_cold_s": rounded(runner.built.kernels_cold_s),
        "kernels_warm_s": rounded(runner.built.kernels_warm_s),
        "error_vs_float64": rounded(runner.error),
        "psnr_db": rounded(runner.psnr),
    }


def _free(device: torch.device) -> None:
    """Give back what the peers of one size held: compiled code, CUDA graph pools, cached memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
