"""What ``match`` finds: a chain of steps around one convolution or norm, and the reasons for what is none."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import fx

from sf_compile.activations import Activation
from sf_compile.graph import spelling
from sf_compile.graph.steps import Activate, Add, Affine, Conv, Crop, Norm, Pad, Step, Upsample
from sf_compile.graph.values import Miss


@dataclass(frozen=True)
class Match:
    """One site: the steps of a chain, in the order they run. At least ``conv`` or ``norm`` is there.

    ``before`` is an activation of what the convolution reads, ``activation`` one of its or its norm's output.
    """

    before: Activate | None = None
    upsample: Upsample | None = None
    pad: Pad | None = None
    conv: Conv | None = None
    crops: tuple[Crop, ...] = ()
    norm: Norm | None = None
    activation: Activate | None = None
    affines: tuple[Affine, ...] = ()
    add: Add | None = None
    upsample_after: Upsample | None = None
    pad_after: Pad | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that are present, first to last."""
        first = (self.before, self.upsample, self.pad, self.conv, *self.crops, self.norm, self.activation)
        every = (*first, *self.affines, self.add, self.upsample_after, self.pad_after)
        return tuple(step for step in every if step is not None)

    @property
    def pattern(self) -> str:
        """The site's kind, spelled like ``upsample+pad+conv+norm+relu``."""
        return "+".join(label for label, _ in itertools.groupby(step.kind for step in self.steps))

    @property
    def moves(self) -> bool:
        """Whether what the site finishes is upsampled or padded by its last steps."""
        return self.upsample_after is not None or self.pad_after is not None

    @property
    def function(self) -> Activation:
        """What ``activation`` and ``affines`` come to."""
        found = Activation() if self.activation is None else self.activation.activation
        for step in self.affines:
            found = found.then(step.scale, step.offset)
        return found

    @property
    def slope(self) -> fx.Node | None:
        """The slope of a PReLU."""
        return None if self.activation is None else self.activation.slope

    @property
    def input(self) -> fx.Node:
        """The tensor that enters the chain."""
        return self.steps[0].input

    @property
    def output(self) -> fx.Node:
        """The node whose value leaves the chain."""
        return self.steps[-1].node

    @property
    def anchor(self) -> fx.Node:
        """The convolution, or the norm of a site without one."""
        step = self.conv or self.norm
        assert step is not None
        return step.node

    @property
    def is_plain(self) -> bool:
        """Whether it is what any classifier has: no padding but the convolution's own, batch norm in eval."""
        padded = self.pad is not None and any(self.pad.padding)
        moved = padded or self.upsample is not None
        return not moved and (self.norm is None or self.norm.node.target is spelling.BATCH_NORM)

    def __repr__(self) -> str:
        return f"{self.pattern}[{' '.join(step.node.name for step in self.steps)}]"


@dataclass(frozen=True)
class Matches:
    """All sites of a graph in graph order, and every near miss with its reason."""

    sites: tuple[Match, ...]
    misses: tuple[Miss, ...]
