"""``styleforge bench``: time this backend and its peers in one run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sf_compile.bench.work import Size, parse_sizes

DESCRIPTION = "time this backend, eager and Inductor in one run, checked against float64 first"

DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``styleforge bench`` to `parser`."""
    parser.add_argument(
        "--suite",
        choices=("network", "instance_norm"),
        default="network",
        help="network: TransformerNet end to end; instance_norm: the fused operation on the shapes that "
        "TransformerNet gives it (default: network)",
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        help="pictures as HEIGHTxWIDTH or BATCHxHEIGHTxWIDTH, separated by commas, for example "
        "512x512,8x1080x1920 (default: 512x512, 1080x1920, 2160x3840 and batch 8; 128x128,256x256 on a CPU)",
    )
    parser.add_argument(
        "--dtypes",
        type=_dtypes,
        help=f"of {', '.join(DTYPES)}, separated by commas (default: float32,float16; float32 on a CPU)",
    )
    parser.add_argument(
        "--peers",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        help="of eager, eager-channels-last, eager-graph, inductor, inductor-reduce-overhead, "
        "inductor-max-autotune, styleforge, styleforge-graph, separated by commas; for suite instance_norm "
        "of eager, inductor, styleforge (default: all that run here)",
    )
    parser.add_argument(
        "--variants",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        help="what follows the norm (suite instance_norm): of plain, relu, relu+residual; by commas "
        "(default: all)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument(
        "--seconds", type=_positive, help="time to measure each peer (default: 1; 0.1 for instance_norm)"
    )
    parser.add_argument(
        "--hot",
        type=_positive,
        metavar="SECONDS",
        help="also load the device with each peer for that long, for rows with condition hot (network only)",
    )
    parser.add_argument("--quick", action="store_true", help="measure as briefly as possible: a smoke test")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="write the rows to this file, as each size is done",
    )
    parser.add_argument("--force", action="store_true", help="replace the output file if it exists")


def _sizes(text: str) -> tuple[Size, ...]:
    try:
        return parse_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"{name!r} is not a dtype; choose from {', '.join(DTYPES)}")
    return names


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

    from sf_compile.bench import instance_norm, network, tables
    from sf_compile.bench.rows import BenchmarkError, Row, check_output, write_rows
    from sf_compile.bench.timing import Budget
    from sf_compile.cli import devices

    if arguments.output is not None:
        check_output(arguments.output, force=arguments.force)
    if arguments.variants and arguments.suite != "instance_norm":
        raise BenchmarkError("--variants belongs to suite instance_norm")
    if arguments.hot and arguments.suite != "network":
        raise BenchmarkError("--hot belongs to suite network")
    device = devices.find(arguments.device)
    on_gpu = device.type == "cuda"
    names = arguments.dtypes or (("float32", "float16") if on_gpu else ("float32",))
    dtypes = [getattr(torch, name) for name in names]
    if arguments.quick:
        budget = Budget.quick()
    elif arguments.suite == "network":
        budget = Budget(seconds=arguments.seconds or 1.0)
    else:
        # Hundreds of cases, each of them light on power: less of everything.
        budget = Budget(seconds=arguments.seconds or 0.1, rounds=5, pause=0.02)

    written = False

    def keep(rows: Sequence[Row]) -> None:
        # What was measured stays, whatever happens to the sizes that follow.
        nonlocal written
        if arguments.output is not None:
            write_rows(arguments.output, rows, force=arguments.force or written)
            written = True

    suite = network if arguments.suite == "network" else instance_norm
    sizes = arguments.sizes or (suite.GPU_SIZES if on_gpu else suite.CPU_SIZES)
    if arguments.suite == "network":
        peers = network.select_peers(arguments.peers, device, _log)
        rows = network.run_network(
            sizes,
            dtypes,
            peers,
            device,
            budget=budget,
            hot=arguments.hot or 0.0,
            quick=arguments.quick,
            log=_log,
            keep=keep,
        )
        table = tables.network_table(rows)
    else:
        operations = instance_norm.select_operations(arguments.peers, device, _log)
        shapes = instance_norm.shapes_of(sizes, target=on_gpu and arguments.sizes is None)
        rows = instance_norm.run_instance_norm(
            shapes,
            dtypes,
            operations,
            device,
            variants=instance_norm.select_variants(arguments.variants),
            budget=budget,
            log=_log,
            keep=keep,
        )
        table = tables.instance_norm_table(rows)
    print(table)
    return 0


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
