"""The suites of ``styleforge bench``: what each is run with, by the words of the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sf_compile.bench.rows import Keep, Row
    from sf_compile.bench.timing import Budget

    Suite = Callable[[argparse.Namespace, torch.device, Sequence[torch.dtype], Keep], list[Row]]

# Of a suite: on a CPU, on a GPU.
DEFAULT_DTYPES = {
    "network": (("float32",), ("float32", "float16")),
    "layers": (("float32",), ("float16",)),
    "instance_norm": (("float32",), ("float32", "float16")),
    "pipeline": (("float32",), ("float16",)),
}
OPTION_SUITES = {
    "variants": ("instance_norm",),
    "hot": ("network", "layers"),
    "width": ("network",),
    "blocks": ("network",),
    "checkpoint": ("network",),
    "precision": ("network",),
}


def find(name: str) -> tuple[Suite, Callable[[Sequence[Row]], str]]:
    """What runs the suite called `name` and returns its rows; and what makes them a table."""
    from sf_compile.bench import tables

    return {
        "network": (_network, tables.network_table),
        "layers": (_layers, tables.layers_table),
        "instance_norm": (_instance_norm, tables.instance_norm_table),
        "pipeline": (_pipeline, tables.pipeline_table),
    }[name]


def _budget(arguments: argparse.Namespace) -> Budget:
    """How long to measure each peer."""
    from sf_compile.bench.timing import Budget

    if arguments.quick:
        return Budget.quick()
    if arguments.suite == "network":
        return Budget(seconds=arguments.seconds or 1.0)
    if arguments.suite == "pipeline":
        # Rounds of hundreds of pictures, for the first and the last of each have nothing to overlap with.
        return Budget(seconds=arguments.seconds or 3.0, rounds=5)
    # Many cases, each of them light on power: less of everything.
    return Budget(seconds=arguments.seconds or 0.1, rounds=5, pause=0.02)


def _sizes(arguments: argparse.Namespace, device: torch.device, suite: Any) -> Any:
    """The pictures that were asked for, else those of ``suite`` for such a device."""
    return arguments.sizes or (suite.GPU_SIZES if device.type == "cuda" else suite.CPU_SIZES)


def _network(
    arguments: argparse.Namespace, device: torch.device, dtypes: Sequence[torch.dtype], keep: Keep
) -> list[Row]:
    from sf_compile.bench import network
    from sf_compile.bench.peers import of_precisions
    from sf_compile.bench.rows import BenchmarkError
    from sf_compile.bench.subject import Subject

    if arguments.checkpoint is None:
        subject = Subject.random(arguments.width or 32, arguments.blocks or 5)
    elif arguments.width is None and arguments.blocks is None:
        subject = Subject.trained(arguments.checkpoint)
    else:
        raise BenchmarkError("--checkpoint has a width and blocks of its own: leave out --width and --blocks")
    return network.run_network(
        _sizes(arguments, device, network),
        dtypes,
        of_precisions(network.select_peers(arguments.peers, device, _log), arguments.precision or ("auto",)),
        device,
        subject=subject,
        budget=_budget(arguments),
        hot=arguments.hot or 0.0,
        quick=arguments.quick,
        log=_log,
        keep=keep,
    )


def _layers(
    arguments: argparse.Namespace, device: torch.device, dtypes: Sequence[torch.dtype], keep: Keep
) -> list[Row]:
    from sf_compile.bench import layers

    return layers.run_layers(
        _sizes(arguments, device, layers),
        dtypes,
        layers.select_peers(arguments.peers),
        device,
        budget=_budget(arguments),
        hot=arguments.hot or 0.0,
        quick=arguments.quick,
        log=_log,
        keep=keep,
    )


def _instance_norm(
    arguments: argparse.Namespace, device: torch.device, dtypes: Sequence[torch.dtype], keep: Keep
) -> list[Row]:
    from sf_compile.bench import instance_norm

    return instance_norm.run_instance_norm(
        instance_norm.shapes_of(
            _sizes(arguments, device, instance_norm), target=device.type == "cuda" and arguments.sizes is None
        ),
        dtypes,
        instance_norm.select_operations(arguments.peers, device, _log),
        device,
        variants=instance_norm.select_variants(arguments.variants),
        budget=_budget(arguments),
        log=_log,
        keep=keep,
    )


def _pipeline(
    arguments: argparse.Namespace, device: torch.device, dtypes: Sequence[torch.dtype], keep: Keep
) -> list[Row]:
    from sf_compile.bench import pipeline

    return pipeline.run_pipeline(
        _sizes(arguments, device, pipeline),
        dtypes,
        pipeline.select_peers(arguments.peers, device, _log),
        device,
        budget=_budget(arguments),
        draw=arguments.plot,
        log=_log,
        keep=keep,
    )


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
