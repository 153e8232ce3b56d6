"""``styleforge bench``: time this backend and its peers in one run, or plot the rows of earlier ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sf_compile.bench.work import Size, parse_sizes
from sf_compile.cli import bench_suites
from sf_compile.options import PRECISIONS

if TYPE_CHECKING:
    from sf_compile.bench.rows import Row

DESCRIPTION = "time this backend, eager and Inductor in one run, checked against float64 first"

DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``styleforge bench`` to `parser`."""
    parser.add_argument(
        "--suite",
        choices=tuple(bench_suites.DEFAULT_DTYPES),
        default="network",
        help="network: TransformerNet end to end; layers: each of its convolutions beside cuDNN's; "
        "instance_norm: the fused operation on the shapes that TransformerNet gives it; pipeline: pictures a "
        "second from host to host (default: network)",
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        help="pictures as HEIGHTxWIDTH or BATCHxHEIGHTxWIDTH, separated by commas, for example "
        "512x512,8x1080x1920 (default: 512x512, 1080x1920, 2160x3840 and more; on a CPU 128x128, 384x384)",
    )
    parser.add_argument(
        "--dtypes",
        type=_dtypes,
        help=f"of {', '.join(DTYPES)}, separated by commas (default: float32,float16; float16 for layers; "
        "float32 on a CPU)",
    )
    parser.add_argument(
        "--peers",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        help="of eager, eager-channels-last, eager-graph, inductor, inductor-reduce-overhead, "
        "inductor-max-autotune, styleforge, styleforge-graph, separated by commas; for suite instance_norm "
        "of eager, inductor, styleforge; for suite layers of styleforge, cudnn; for suite pipeline of "
        "compute, pipeline, loop, loop-inductor-max-autotune (default: all that run here)",
    )
    parser.add_argument(
        "--variants",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        help="what follows the norm (suite instance_norm): of plain, relu, relu+residual; by commas "
        "(default: all)",
    )
    parser.add_argument(
        "--width",
        type=_count,
        help="channels of the network's first layer, of which the others are multiples (suite network; "
        "default: 32)",
    )
    parser.add_argument(
        "--precision",
        type=_precisions,
        help=f"what styleforge computes in, whatever the model's dtype: of {', '.join(PRECISIONS)}, by "
        "commas, each a peer of its own; int8 is held to its min_psnr; of fp32 alone every peer computes "
        "without TF32 (suite network; default: auto, as the model)",
    )
    parser.add_argument("--blocks", type=_count, help="residual blocks (suite network; default: 5)")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="time the network in this file, with its weights (suite network)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument(
        "--seconds",
        type=_positive,
        help="time to measure each peer (default: 1 for network, 3 for pipeline, else 0.1)",
    )
    parser.add_argument(
        "--hot",
        type=_positive,
        metavar="SECONDS",
        help="also load the device with each peer for that long, for rows with condition hot "
        "(suites network and layers)",
    )
    parser.add_argument("--quick", action="store_true", help="measure as briefly as possible: a smoke test")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="write the rows to this file, as each size is done",
    )
    parser.add_argument("--force", action="store_true", help="replace the output file if it exists")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="measure nothing: draw a roofline plot of the rows of suite layers in ROWS.json; with suite "
        "pipeline: measure, and draw when each step of a stream happened",
    )
    parser.add_argument("rows", nargs="*", type=Path, metavar="ROWS.json", help="files to --plot")


def _sizes(text: str) -> tuple[Size, ...]:
    try:
        return parse_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _dtypes(text: str) -> tuple[str, ...]:
    return _names_of(text, DTYPES, "dtype")


def _precisions(text: str) -> tuple[str, ...]:
    return _names_of(text, PRECISIONS, "precision")


def _names_of(text: str, known: Collection[str], what: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not a {what}; choose from {', '.join(known)}")
    return names


def _count(text: str) -> int:
    # Beyond 999 no network is meant.
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    # NaN and infinity would never end.
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Run the suite, print its table, write its rows; return 0, or 1 after an error message."""
    import torch

    from sf_compile.bench.rows import BenchmarkError

    try:
        return _run(arguments)
    except BenchmarkError as error:
        print(f"styleforge bench: {error}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        print(
            f"styleforge bench: out of memory, choose smaller --sizes or fewer --peers: {error}",
            file=sys.stderr,
        )
    return 1


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from sf_compile.bench.roofline import check_plot
    from sf_compile.bench.rows import BenchmarkError, check_output, write_rows
    from sf_compile.cli import devices

    if (arguments.plot is not None and arguments.suite != "pipeline") or arguments.rows:
        return _plot(arguments)
    if arguments.plot is not None:
        check_plot(arguments.plot, force=arguments.force)
    if arguments.output is not None:
        check_output(arguments.output, force=arguments.force)
    for option, suites in bench_suites.OPTION_SUITES.items():
        if getattr(arguments, option) is not None and arguments.suite not in suites:
            raise BenchmarkError(f"--{option} belongs to suite {' and '.join(suites)}")
    device = devices.find(arguments.device)
    names = arguments.dtypes or bench_suites.DEFAULT_DTYPES[arguments.suite][device.type == "cuda"]
    dtypes = [getattr(torch, name) for name in names]
    written = False

    def keep(rows: Sequence[Row]) -> None:
        # What was measured stays, whatever happens to the sizes that follow.
        nonlocal written
        if arguments.output is not None:
            write_rows(arguments.output, rows, force=arguments.force or written)
            written = True

    run_suite, table = bench_suites.find(arguments.suite)
    print(table(run_suite(arguments, device, dtypes, keep)))
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from sf_compile.bench.roofline import check_plot, plot, read_rows
    from sf_compile.bench.rows import BenchmarkError

    if arguments.plot is None or not arguments.rows:
        raise BenchmarkError("a plot takes both: styleforge bench --plot FILE.png ROWS.json...")
    check_plot(arguments.plot, force=arguments.force)
    plot(arguments.plot, read_rows(arguments.rows))
    return 0
