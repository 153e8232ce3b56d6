"""The network that is timed: a TransformerNet with random weights, or the one in a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from sf_compile.bench.rows import BenchmarkError, Row
from sf_compile.bench.work import Size, transformer_net_flop
from sf_compile.models import CheckpointError, TensorFlowTransformNet, TransformerNet, load_checkpoint

SEED = 0


@dataclass(frozen=True)
class Subject:
    """The network that is timed.

    Attributes:
        model: in eval mode on the CPU, float32; nothing changes it.
        checkpoint: the name, without its folder, of the file that its weights come from; None for random
            ones.
    """

    model: TransformerNet | TensorFlowTransformNet
    checkpoint: str | None = None

    @classmethod
    def random(cls, width: int = 32, blocks: int = 5) -> Subject:
        """Make a TransformerNet with `width` channels in its first layer and random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return cls(TransformerNet(width=width, blocks=blocks).eval())

    @classmethod
    def trained(cls, path: Path) -> Subject:
        """Load the network in a checkpoint file.

        Raises:
            BenchmarkError: there is none, or it is damaged or foreign.
        """
        try:
            return cls(load_checkpoint(path), path.name)
        except CheckpointError as error:
            raise BenchmarkError(str(error)) from error

    def row(self) -> Row:
        """Return the fields of a row that say which network it is."""
        transformer_net = isinstance(self.model, TransformerNet)
        return {
            "network": "transformer_net" if transformer_net else "tf_transform_net",
            "network_width": self.model.width,
            "blocks": self.model.blocks,
            "checkpoint": self.checkpoint,
        }

    def flop(self, size: Size) -> int:
        """Operations of the convolutions, each in the form that needs the fewest."""
        if isinstance(self.model, TransformerNet):
            return transformer_net_flop(size, width=self.model.width, blocks=self.model.blocks)
        # A transposed convolution needs no other form: it multiplies every tap with every input pixel once.
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(self.model).to("meta")(torch.empty(size.batch, 3, *size[1:], device="meta"))
        return counter.get_total_flops()
