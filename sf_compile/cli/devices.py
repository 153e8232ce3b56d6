"""What the subcommands share: which device to run on, and which network to run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch._dynamo.exc import InvalidBackend

from sf_compile import models
from sf_compile.cli import CommandError


def find(name: str | None) -> torch.device:
    """Return the device of that name; for None the GPU if PyTorch can use one, else the CPU.

    Raises:
        CommandError: not cpu, cuda or cuda:N, or no such GPU.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"no device {name!r}; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise CommandError(f"PyTorch finds no GPU for {name!r}; `styleforge doctor` says why")
        if (device.index or 0) >= torch.cuda.device_count():
            raise CommandError(f"no device {name!r}; this machine has {torch.cuda.device_count()} GPU(s)")
    return device


def load_network(name: str) -> nn.Module:
    """`models.load`, with its errors as one line for the user.

    Raises:
        CommandError: neither a checkpoint that loads nor a built-in style that is installed.
    """
    try:
        return models.load(name)
    except (models.MissingExtraError, ValueError) as error:
        raise CommandError(str(error)) from error


def compile_network(network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """``torch.compile(network, backend="styleforge")``.

    Raises:
        CommandError: the backend is not registered, because sf_compile is not installed.
    """
    try:
        return torch.compile(network, backend="styleforge")
    except InvalidBackend as error:
        raise CommandError(
            "torch.compile does not know the backend 'styleforge'; install sf_compile with pip, or add "
            "--no-compile"
        ) from error
