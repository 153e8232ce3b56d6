"""A network as data: its layers, its statements, its input. What is run is the text that is printed."""

from __future__ import annotations

import itertools
import linecache
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

_numbers = itertools.count()
_KERNEL_OF_1 = re.compile(r"Conv2d\(\d+, \d+, (1|\(1, 1\)),|randn\(\d+, \d+, 1, 1\)")
_STRIDED = re.compile(r"stride=(?!1\b)")
_WIDE = re.compile(r"Conv2d\(\d+, \d+, (?:[89],|\(\d+, [89]\))|randn\(\d+, \d+, \d+, [89]\)")

_FIRST, _LAST = "# A network of tests/fuzz, which runs alone.", "# Its last line."

_SOURCE = f"{_FIRST}\n" + '''\
import torch
import torch.nn.functional as F
from torch import nn

DEVICE, DTYPE, GRAD = "{device}", torch.{dtype}, "{grad}"
INPUT_REUSED = {input_reused}  # whether one that wants no gradient is written to before the backward pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
{modules}

    def forward(self, x):
{statements}
        return {results}


def network():
    """The network with weights that are the same in every call, none of them at its initial value."""
    torch.manual_seed({seed})
    net = Net().train({training})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in net.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    net = net.to(DEVICE, DTYPE)
    return net{network_format}


def picture(size):
    """The input, (N, C, H, W) as ``size`` says."""
    torch.manual_seed({seed} + 1)
    x = torch.randn(size, dtype=torch.float64).to(DEVICE, DTYPE)
    return {layout}


def gradients(net, x, outputs):
    """Of a sum of ``outputs`` by every parameter, and by ``x`` if it wants one."""
    wanted = [out for out in outputs if out.requires_grad]
    if not wanted:
        return []
    if INPUT_REUSED and not x.requires_grad:
        x.mul_(0.5)
    leaves = [*net.parameters(), *([x] if x.requires_grad and x.is_leaf else [])]
    total = sum((2 * out.double()).sin().sum() for out in wanted)
    return torch.autograd.grad(total, leaves, allow_unused=True)


def compare(what, a, b):
    print(what, tuple(a.shape), "differ by at most", (a.double() - b.double()).abs().max())


SIZES = {sizes}

if __name__ == "__main__":
    from sf_compile.backend import styleforge

    options = {{"layout": "{inner_layout}", "fallback": {fallback}}}
    nets = network(), network()
    compiled = torch.compile(nets[1], backend=styleforge, dynamic={dynamic}, options=options)
    for size in SIZES:
        pictures = picture(size), picture(size)
        with getattr(torch, GRAD)():
            results = nets[0](pictures[0]), compiled(pictures[1])
            for number, pair in enumerate(zip(*results, strict=True)):
                compare(f"{{size}} output {{number}}", *pair)
            found = [gradients(*each) for each in zip(nets, pictures, results, strict=True)]
        for number, (a, b) in enumerate(zip(*found, strict=True)):
            if a is not None and b is not None:
                compare(f"{{size}} gradient {{number}}", a, b)
''' + f"{_LAST}\n"

LAYOUTS = {
    "contiguous": "x",
    "channels_last": "x.contiguous(memory_format=torch.channels_last)",
    "transposed": "x.transpose(2, 3).contiguous().transpose(2, 3)",
    "sliced": "torch.cat([x, x], 3)[:, :, :, : size[3]]",
    "every second": "torch.stack([x, x], 4)[..., 0]",
    "expanded": "x[:1].expand(size)",
}
"""How the input lies in memory, and the expression that makes it so of a contiguous ``x``."""

FALLBACKS = {"eager": '"eager"', "aot_eager": 'torch._dynamo.lookup_backend("aot_eager")'}
"""What runs the rewritten graph, and its expression; ``aot_eager`` traces the fused ops by their fakes."""


def printed(output: str) -> str | None:
    """The file of the network that ``output`` ends with, as pytest prints it, each line behind a margin."""
    lines = output.splitlines()
    ends = [i for i, line in enumerate(lines) if line.endswith(_LAST)]
    begins = [i for i, line in enumerate(lines[: ends[-1]]) if line.endswith(_FIRST)] if ends else []
    if not begins:
        return None
    margin = len(lines[begins[-1]]) - len(_FIRST)
    return "".join(line[margin:] + "\n" for line in lines[begins[-1] : ends[-1] + 1])


@dataclass(frozen=True)
class Program:
    """A network that ``source`` writes as a module which runs alone.

    Attributes:
        modules: The layers, as (name, constructor) pairs of text.
        statements: The lines of ``forward``, each a statement about ``x`` and earlier names.
        results: The names that ``forward`` returns, always as a tuple.
        sizes: (N, C, H, W) of the input, for each call.
        dtype: Of the network and the input, without ``torch.``.
        layout: A key of ``LAYOUTS``.
        network_format: ``""`` or ``"channels_last"``, of the weights.
        training: Whether the network is in training.
        grad: The mode it runs in: ``"enable_grad"``, ``"no_grad"`` or ``"inference_mode"``.
        input_grad: Whether the input wants a gradient, where there are any.
        input_reused: Whether one that wants none is written to between the call and the backward pass.
        dynamic: What torch.compile gets as ``dynamic``.
        inner_layout: The backend's option ``layout``.
        fallback: A key of ``FALLBACKS``, the backend's option ``fallback``.
        device: ``"cpu"`` or ``"cuda"``.
        seed: Of the weights and the input.
    """

    modules: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]
    results: tuple[str, ...]
    sizes: tuple[tuple[int, int, int, int], ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    network_format: str = ""
    training: bool = False
    grad: str = "no_grad"
    input_grad: bool = False
    input_reused: bool = False
    dynamic: bool | None = None
    inner_layout: str = "auto"
    fallback: str = "eager"
    device: str = "cpu"
    seed: int = 0

    @property
    def writes_to_input(self) -> bool:
        """Whether an input that wants no gradient is written to before the backward pass."""
        return self.input_reused and self.layout != "expanded"  # of which many pixels are one number

    @property
    def source(self) -> str:
        """A Python file that builds the network, runs it compiled and not, and prints the difference."""
        modules = [f"        self.{name} = {made}" for name, made in self.modules] or ["        pass"]
        statements = [f"        {line}" for text in self.statements for line in text.splitlines()] or [
            "        pass"
        ]
        requires = ".detach().requires_grad_()" if self.input_grad and self.grad == "enable_grad" else ""
        network_format = f".to(memory_format=torch.{self.network_format})" if self.network_format else ""
        return _SOURCE.format(
            device=self.device, dtype=self.dtype, grad=self.grad,
            input_reused=self.writes_to_input, modules="\n".join(modules),
            statements="\n".join(statements), results=f"({', '.join(self.results)},)", seed=self.seed,
            training=self.training, network_format=network_format,
            layout=f"({LAYOUTS[self.layout]}){requires}", sizes=self.sizes, dynamic=self.dynamic,
            inner_layout=self.inner_layout, fallback=FALLBACKS[self.fallback],
        )  # fmt: skip

    @property
    def is_differentiated(self) -> bool:
        """Whether its gradients are compared.

        On a CPU the backward pass of a group norm in channels_last, whose weight wants a gradient and whose
        input does not, ends PyTorch 2.13 by a write to address 0, and that of a 1x1 convolution with a stride
        writes behind the memory of the weight's gradient.
        """
        if self.device != "cpu":
            return True
        in_channels_last = "channels_last" in (self.network_format, self.layout)
        strided = _KERNEL_OF_1.search(self.source) and _STRIDED.search(self.source)
        return not any(name in self.source for name in ("group_norm", "GroupNorm")) and not (
            in_channels_last and strided
        )

    @property
    def is_misread(self) -> bool:
        """Whether oneDNN may read behind a picture: with AMX, in bfloat16, of kernels 8 or 9 wide.

        Seen of PyTorch 2.13. What it finds there differs from call to call, and so do its numbers.
        """
        wide = "bfloat16" in self.source and _WIDE.search(self.source) is not None
        return wide and self.device == "cpu" and torch.cpu._is_amx_tile_supported()

    def __repr__(self) -> str:
        """The file itself, so that a failing example is printed ready to paste."""
        return f"\n{self.source}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints: it would print a dataclass by its fields."""
        printer.text(repr(self))

    def load(self) -> Loaded:
        """Run the source as a module of its own."""
        name = f"<fuzzed network {next(_numbers)}>"
        # Where Dynamo and tracebacks look for the lines of a file that is none.
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        made: dict[str, Any] = {"__name__": name}
        exec(compile(self.source, name, "exec"), made)
        return Loaded(SimpleNamespace(**made), name)


@dataclass(frozen=True)
class Loaded:
    """A program's module, ``file`` as tracebacks call it."""

    module: SimpleNamespace
    file: str

    def network(self) -> nn.Module:
        """A new network, with the weights that every other one has."""
        return self.module.network()

    def picture(self, size: tuple[int, ...]) -> Tensor:
        """A new input, with the pixels that every other one of this size has."""
        return self.module.picture(size)

    def forget(self) -> None:
        """Drop the lines that ``load`` kept for tracebacks."""
        linecache.cache.pop(self.file, None)
