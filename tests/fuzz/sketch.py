"""A network while it is drawn: every statement runs as soon as it is written, so shapes are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

T = TypeVar("T")

LARGEST = 60_000
"""Elements of a tensor; a statement that makes a larger one is not taken."""

# What PyTorch raises for arguments that do not fit.
REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)


class Sketch:
    """Statements and layers drawn so far, with the values of every name.

    Attributes:
        modules: Layers as (name, constructor).
        statements: Lines of ``forward``.
        names: Every tensor's name, oldest first; ``x`` is the input.
        newest: What the next layer reads, as a rule.
        refused: Whether the last statement is one that PyTorch refuses: nothing can follow it.
    """

    def __init__(
        self, draw: Any, x: Tensor, training: bool, channels: Sequence[int], kernels: Sequence[int],
        refusals: bool,
    ) -> None:  # fmt: skip
        self.draw = draw
        self.channels = channels
        self.kernels = kernels
        self.training = training
        self.refusals = refusals
        self.modules: list[tuple[str, str]] = []
        self.statements: list[str] = []
        self.names = ["x"]
        self.newest = "x"
        self.refused = False
        self._layers = SimpleNamespace(training=training)
        self._values: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "self": self._layers, "x": x}

    @property
    def called_modules(self) -> tuple[tuple[str, str], ...]:
        """The layers that a statement names; others were drawn for statements that were not taken."""
        called = set(re.findall(r"self\.(layer\d+)", "\n".join(self.statements)))
        return tuple((name, made) for name, made in self.modules if name in called)

    def value(self, name: str) -> Tensor:
        """The tensor called ``name``; it has small pixels, but the true shape, strides and dtype."""
        return self._values[name]

    def one_of(self, *choices: T) -> T:
        """One of the choices; the first is the simplest."""
        return self.draw_from(choices)

    def draw_from(self, choices: Sequence[T]) -> T:
        """One of a sequence."""
        return self.draw(st.sampled_from(choices))

    def one_in(self, number: int) -> bool:
        """True once in ``number`` times; False is simpler."""
        return self.draw(st.integers(0, number - 1)) == number - 1

    def pick(self, rank: int | None = None) -> str:
        """A tensor's name: the newest, or any, of ``rank`` dimensions if one is given."""
        fitting = [name for name in reversed(self.names) if rank is None or self.value(name).dim() == rank]
        if not self.one_in(4) and self.newest in fitting:
            return self.newest
        return self.draw_from(fitting)

    def layer(self, constructor: str) -> str:
        """``self.<name>`` of a layer or parameter built so: a new one, or an equal one that is there."""
        same = [name for name, made in self.modules if made == constructor]
        if same and self.one_in(2):
            return f"self.{same[-1]}"
        name = f"layer{len(self.modules)}"
        made = eval(constructor, self._values)
        setattr(self._layers, name, made.train(self.training) if isinstance(made, nn.Module) else made)
        self.modules.append((name, constructor))
        return f"self.{name}"

    def let(self, expression: str) -> str:
        """A new name for ``expression``, which becomes the newest; the newest as it was if refused."""
        name = f"t{len(self.statements)}"
        return self.run(f"{name} = {expression}", name)

    def run(self, statement: str, name: str = "") -> str:
        """Take ``statement``, which gives ``name`` its value; returns the newest name."""
        if self.refused:
            return self.newest
        values = dict(self._values)
        try:
            with torch.no_grad():
                exec(statement, values)
        except REFUSALS:
            self.refused = self.refusals
            if self.refused:
                self.statements.append(statement)
            return self.newest
        if name and not (isinstance(values[name], Tensor) and 0 < values[name].numel() <= LARGEST):
            return self.newest
        self.statements.append(statement)
        self._values = values
        if name:
            self.names.append(name)
            self.newest = name
        return self.newest
