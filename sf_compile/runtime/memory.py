"""How much memory a call needs, in bytes by what it is for, and as a report says it.

``sf_compile.runtime.memory_prediction`` tells it before the call.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes that one call needs.

    Attributes:
        input: Its inputs that are no parameters.
        output: What it returns.
        activations: What it makes on the way and drops, at most at any time.
        workspaces: In which kernels meet; kept for the next call.
        packed_weights: Weights in the layouts of the kernels; kept for the next call beside the model's own.
        exact: Whether all operations are known to take nothing else.
    """

    input: int
    output: int
    activations: int
    workspaces: int
    packed_weights: int
    exact: bool

    @property
    def peak(self) -> int:
        """What a call needs at its peak, its inputs included, weights not."""
        return self.input + self.output + self.activations + self.workspaces

    @property
    def graph(self) -> int:
        """The same of a call that replays a CUDA graph: inputs and results are copied."""
        return self.peak + self.input + self.output

    def to_dict(self) -> dict[str, Any]:
        """The numbers, with ``peak``."""
        return {**asdict(self), "peak": self.peak}

    def __str__(self) -> str:
        parts = ("input", "output", "activations", "workspaces")
        text = ", ".join(f"{name} {mebibytes(getattr(self, name))}" for name in parts)
        more = "" if self.exact else ", and what operations of PyTorch take while they run"
        return (
            f"{mebibytes(self.peak)} MiB at the peak of a call ({text}{more}); "
            f"packed weights {mebibytes(self.packed_weights)}"
        )


def mebibytes(size: int) -> str:
    """A number of bytes in MiB: 12, 1.5, 0.02."""
    value = size / MEBIBYTE
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
