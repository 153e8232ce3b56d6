"""Suite ``instance_norm``: one fused operation against the bytes it must move.

Device time only, from device memory and not from the cache: see :mod:`sf_compile.bench.replays`. The copy
that `share_of_copy` refers to is ``Tensor.copy_`` of a tensor of the same shape,
dtype and layout, captured and timed in the same way and in the same rounds.

`bytes` are what must be moved (:func:`sf_compile.bench.work.instance_norm_bytes`), not what a peer
moves; `gbps` is that over its time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from sf_compile.bench.checks import check_output, relative_error
from sf_compile.bench.peers import PEERS
from sf_compile.bench.replays import calls_in_replay, l2_bytes, repeated, rotating_sets
from sf_compile.bench.rows import BenchmarkError, Keep, Log, Row, dtype_name, environment_of, forget, rounded
from sf_compile.bench.timing import Budget, interleaved
from sf_compile.bench.work import Shape, Size, instance_norm_bytes, parse_sizes, transformer_net_norm_shapes

GPU_SIZES = parse_sizes("512x512,1080x1920,2160x3840,8x512x512,8x1080x1920,8x2160x3840")
CPU_SIZES = parse_sizes("128x128,256x256")
# The two shapes that the bandwidth target names.
TARGET_SHAPES = (Shape(1, 32, 1080, 1920), Shape(8, 128, 128, 128))
EPS = 1e-5
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Variant:
    """What is fused behind the norm, in this order: the activation, then the addition."""

    name: str
    activation: str
    residual: bool


@dataclass(frozen=True)
class Operands:
    """One input set; `weight` and `bias` have shape (C,), the others the case's shape."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None


@dataclass(frozen=True)
class Case:
    """One thing to time: everything but the peer."""

    shape: Shape
    layout: str
    dtype: torch.dtype
    variant: Variant

    def __str__(self) -> str:
        return f"instance_norm {self.variant.name} {self.shape} {self.layout} {dtype_name(self.dtype)}"


Operation = Callable[[Operands], Tensor]

VARIANTS = (
    Variant("plain", "none", False),
    Variant("relu", "relu", False),
    Variant("relu+residual", "relu", True),
)


def _plain(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """Return act(instance_norm(input)) + residual in PyTorch's own operations."""
    out = F.instance_norm(input, weight=weight, bias=bias, eps=EPS)
    if activation == "relu":
        out = F.relu(out)
    return out if residual is None else out + residual


def _eager(case: Case) -> Operation:
    activation = case.variant.activation
    return lambda operands: _plain(
        operands.input, operands.weight, operands.bias, operands.residual, activation
    )


def _inductor(case: Case) -> Operation:
    activation = case.variant.activation
    compiled = torch.compile(_plain, backend="inductor", dynamic=False, fullgraph=True)
    return lambda operands: compiled(
        operands.input, operands.weight, operands.bias, operands.residual, activation
    )


def _styleforge(case: Case) -> Operation:
    from sf_compile.ops import instance_norm

    activation, channels_last = case.variant.activation, case.layout == "channels_last"
    return lambda operands: instance_norm(
        operands.input, operands.weight, operands.bias, EPS, activation, operands.residual, channels_last
    )


OPERATIONS: dict[str, Callable[[Case], Operation]] = {
    "eager": _eager,
    "inductor": _inductor,
    "styleforge": _styleforge,
}


def select_operations(names: Sequence[str] | None, device: torch.device, log: Log) -> list[str]:
    """Return the peers called `names`, or, for None, all that can run on `device`.

    Raises:
        BenchmarkError: a name is unknown to this suite, or a named peer cannot run here.
    """
    chosen = []
    for name in dict.fromkeys(OPERATIONS if names is None else names):
        if name not in OPERATIONS:
            raise BenchmarkError(
                f"suite instance_norm has no peer {name!r}; choose from {', '.join(OPERATIONS)}"
            )
        # styleforge needs no backend here: the operation is called directly.
        reason = None if name == "styleforge" else PEERS[name].missing(device)
        if reason is None:
            chosen.append(name)
        elif names is None:
            log(f"without {name}: {reason}")
        else:
            raise BenchmarkError(f"peer {name} cannot run on {device}: {reason}")
    return chosen


def select_variants(names: Sequence[str] | None) -> tuple[Variant, ...]:
    """Return the variants called `names`, or, for None, all of them.

    Raises:
        BenchmarkError: a name is unknown.
    """
    known = {variant.name: variant for variant in VARIANTS}
    for name in names or ():
        if name not in known:
            raise BenchmarkError(f"no variant is called {name!r}; choose from {', '.join(known)}")
    return VARIANTS if names is None else tuple(known[name] for name in names)


def shapes_of(sizes: Sequence[Size], *, target: bool) -> list[Shape]:
    """Return what TransformerNet normalises at `sizes`, and the target's two shapes where asked."""
    shapes = [shape for size in sizes for shape in transformer_net_norm_shapes(size)]
    return list(dict.fromkeys((TARGET_SHAPES if target else ()) + tuple(shapes)))


def run_instance_norm(
    shapes: Sequence[Shape],
    dtypes: Sequence[torch.dtype],
    peers: Sequence[str],
    device: torch.device,
    *,
    variants: Sequence[Variant] = VARIANTS,
    budget: Budget,
    log: Log,
    keep: Keep = forget,
) -> list[Row]:
    """Check and time `peers` on every shape, layout, dtype and variant; one row each.

    `keep` receives all rows so far whenever a shape is done in one layout and dtype.

    Raises:
        BenchmarkError: a peer's result is wrong.
    """
    environment = environment_of(device)
    rows: list[Row] = []
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), on_device:
        for shape in shapes:
            for layout in LAYOUTS:
                for dtype in dtypes:
                    log(f"instance_norm {shape} {layout} {dtype_name(dtype)}")
                    for variant in variants:
                        case = Case(shape, layout, dtype, variant)
                        rows += [vars(environment) | row for row in _run_case(case, peers, device, budget)]
                        torch._dynamo.reset()
                    keep(rows)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
    return rows


def _run_case(case: Case, peers: Sequence[str], device: torch.device, budget: Budget) -> list[Row]:
    """Check, then time, all peers and the copy."""
    size = case.dtype.itemsize
    residual = case.variant.residual
    tensor = math.prod(case.shape) * size
    on_gpu = device.type == "cuda"
    sets = _operands(case, device, rotating_sets(tensor * (3 if residual else 2), device))
    calls = calls_in_replay(len(sets), 2 * tensor, device)

    operations = {name: OPERATIONS[name](case) for name in peers}
    reference = _reference(case, sets[0])
    eager_error = relative_error(_eager(case)(sets[0]), reference)
    errors = {
        name: check_output(name, operation(sets[0]), reference, eager_error, str(case))
        for name, operation in operations.items()
    }
    del reference

    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    targets = [torch.empty_like(one.input) for one in sets]
    copy = repeated(lambda number: targets[number].copy_(sets[number].input), len(sets), calls, pool)
    runs = {name: repeated(_numbered(one, sets), len(sets), calls, pool) for name, one in operations.items()}
    every = {"copy": copy, **runs}
    samples = interleaved(every, {name: [sets[0].input] for name in every}, budget)

    layout = case.layout == "channels_last"
    moved = instance_norm_bytes(
        case.shape, element_size=size, channels_last=layout, residual=residual, l2_bytes=l2_bytes(device)
    )
    copy_gbps = 2 * tensor * calls / samples["copy"].percentile(50) / 1e6
    rows: list[Row] = []
    for name in peers:
        p20, median, p80 = (samples[name].percentile(q) * 1e3 / calls for q in (20, 50, 80))
        gbps = moved / median / 1e3
        rows.append(
            {
                "op": "instance_norm",
                "shape": str(case.shape),
                "layout": case.layout,
                "dtype": dtype_name(case.dtype),
                "variant": case.variant.name,
                "peer": name,
                "condition": "cool",
                "median_us": rounded(median),
                "p20_us": rounded(p20),
                "p80_us": rounded(p80),
                "bytes": moved,
                "gbps": rounded(gbps),
                "copy_gbps": rounded(copy_gbps),
                "share_of_copy": rounded(gbps / copy_gbps),
                "error_vs_float64": rounded(errors[name]),
            }
        )
    return rows


def _operands(case: Case, device: torch.device, count: int) -> list[Operands]:
    """Draw `count` input sets; the mean is twice the deviation, as behind a convolution it may well be."""
    generator = torch.Generator(device).manual_seed(0)

    def random(mean: float, deviation: float) -> Tensor:
        out = torch.empty(case.shape, device=device, dtype=case.dtype, memory_format=LAYOUTS[case.layout])
        return out.normal_(mean, deviation, generator=generator)

    weight = torch.rand(case.shape.c, generator=generator, device=device).add(0.5).to(case.dtype)
    bias = torch.randn(case.shape.c, generator=generator, device=device).to(case.dtype)
    return [
        Operands(random(100, 50), weight, bias, random(0, 1) if case.variant.residual else None)
        for _ in range(count)
    ]


def _reference(case: Case, operands: Operands) -> Tensor:
    """Compute the result in float64, a picture at a time, and return it in float64."""
    weight, bias = operands.weight.double(), operands.bias.double()
    pictures = []
    for number, one in enumerate(operands.input.split(1)):
        residual = None if operands.residual is None else operands.residual[number : number + 1].double()
        pictures.append(_plain(one.double(), weight, bias, residual, case.variant.activation))
    return torch.cat(pictures)


def _numbered(operation: Operation, sets: Sequence[Operands]) -> Callable[[int], Tensor]:
    """Return the operation as a function of the number of its input set."""
    return lambda number: operation(sets[number])
