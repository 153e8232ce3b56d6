"""``styleforge explain``: what the backend does with a network, layer by layer."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys

import torch
from torch import nn

import sf_compile
from sf_compile import models
from sf_compile.cli import CommandError, devices

DESCRIPTION = "Show which layers of a network are fused for one input size, and why the others are not."
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``styleforge explain``."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a checkpoint file, a built-in style, 'transformer_net' (untrained), or module:callable "
        "that returns an nn.Module",
    )
    parser.add_argument("--size", type=_size, default=(512, 512), metavar="HxW",
                        help="input height and width, or one number for both (default: 512x512)")
    parser.add_argument("--batch", type=_count, default=1, metavar="N", help="images at once (default: 1)")
    parser.add_argument("--channels", type=_count, default=3, metavar="C", help="input channels (default: 3)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default: float32")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Print the report on one network; see `add_arguments`. Returns 0.

    Raises:
        CommandError: no such network, or one that rejects an input of this size.
    """
    device = devices.find(arguments.device)
    dtype = DTYPES[arguments.dtype]
    network = load_target(arguments.target).to(device=device, dtype=dtype).eval()
    height, width = arguments.size
    shape = (arguments.batch, arguments.channels, height, width)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul(255).to(device=device, dtype=dtype)
    with torch.inference_mode():
        _check_input(network, x)
        report = sf_compile.explain(network, x)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else str(report))
    return 0


def _check_input(network: nn.Module, x: torch.Tensor) -> None:
    """Run eagerly first: what Dynamo says and logs about a rejected input is a page long."""
    try:
        network(x)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise CommandError(f"the network rejects an input of shape {tuple(x.shape)}: {reason}") from error


def load_target(target: str) -> nn.Module:
    """Load what TARGET names: ``module:callable``, ``transformer_net``, a checkpoint or a built-in style.

    The callable is called without arguments; its module may lie in the current folder. An existing
    file wins over the other readings.

    Raises:
        CommandError: nothing of that name, or the callable returned something else than an nn.Module.
    """
    if os.path.exists(target):
        return devices.load_network(target)
    if target == "transformer_net":
        torch.manual_seed(0)
        return models.TransformerNet()
    match = re.fullmatch(r"([\w.]+):([\w.]+)", target)
    return devices.load_network(target) if match is None else _call(match[1], match[2])


def _call(module_name: str, attribute: str) -> nn.Module:
    target = f"{module_name}:{attribute}"
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # an installed command does not look there by itself
    try:
        value = importlib.import_module(module_name)
    except ImportError as error:
        raise CommandError(f"{target}: cannot import {module_name} ({error})") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise CommandError(f"{target}: {module_name} has no {attribute}")
        value = getattr(value, part)
    if not callable(value) or isinstance(value, nn.Module):
        raise CommandError(f"{target}: expected a class or a function that returns an nn.Module")
    network = value()
    if not isinstance(network, nn.Module):
        raise CommandError(f"{target}() returned {type(network).__name__}, expected an nn.Module")
    return network


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"expected HxW such as 720x1280, got {text!r}")
    return height, width


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
