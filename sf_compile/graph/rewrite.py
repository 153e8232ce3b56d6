"""Stage 4: apply a plan to the normalised copy. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from sf_compile.graph.normalize import NormalizedGraph
from sf_compile.graph.plan import Decision, Plan
from sf_compile.graph.sites import Match
from sf_compile.graph.steps import ConvTranspose
from sf_compile.graph.values import value_of

_STAY = (1, [0, 0, 0, 0], "zeros")  # neither upsampled nor padded


@dataclass
class _Pending:
    """A raw output whose finish was deferred: what ``conv2d`` takes to apply it."""

    raw: fx.Node
    mean: Any
    variance: Any
    decision: Decision

    @property
    def site(self) -> Match:
        """Whose output it is."""
        return self.decision.site


def rewrite(graph: NormalizedGraph, plan: Plan) -> fx.GraphModule:
    """Replace every planned site in ``graph`` by its ops; returns a module that runs it.

    The graph itself is changed, and valid after it; nodes outside the sites are untouched. A node that calls
    one of our ops has in ``meta["sites"]`` the names of the anchors of the sites that it runs: one.
    """
    writer = _Writer(graph.graph)
    for index, decision in enumerate(plan.decisions):
        writer.apply(index, decision)
    for decision in reversed(plan.decisions):
        for step in reversed(decision.site.steps):
            graph.graph.erase_node(step.node)
    graph.graph.lint()
    return graph.as_module()


class _Writer:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.pending: dict[int, _Pending] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.copies: dict[fx.Node, fx.Node] = {}  # of those, for readers that know one dtype only
        self.site = ""
        self.converts = True

    def call(self, name: str, args: tuple[Any, ...]) -> fx.Node:
        """A call of ``styleforge::name``; arguments that were replaced are read from their replacement."""
        op = getattr(torch.ops.styleforge, name).default
        known = self.replaced if self.converts else self.replaced | self.copies
        made = self.graph.call_function(op, fx.map_arg(args, lambda node: known.get(node, node)))
        made.meta["sites"] = (self.site,)
        return made

    def replace(self, old: fx.Node, new: fx.Node, dtype: torch.dtype | None = None) -> None:
        """Let every reader of ``old`` read ``new``, which is of ``dtype`` if that may be another."""
        new.meta.update(old.meta)
        if dtype is not None and value_of(old).dtype != dtype:
            new.meta.pop("example_value", None)  # it is of the dtype that eager PyTorch has
        old.replace_all_uses_with(new)
        self.replaced[old] = new

    def apply(self, index: int, decision: Decision) -> None:
        """Insert one site's op at its anchor, and its finish at its end unless that is deferred."""
        site = decision.site
        self.site = site.anchor.name
        self.converts = site.conv is not None
        mean: Any = None
        variance: Any = None
        if site.norm is not None:
            mean, variance = site.norm.mean, site.norm.variance
        with self.graph.inserting_before(site.anchor):
            if site.conv is not None:
                out = self.convolution(index, decision)
                raw = self.graph.call_function(getitem, (out, 0))
                if site.norm is not None and mean is None:
                    mean = self.graph.call_function(getitem, (out, 1))
                    variance = self.graph.call_function(getitem, (out, 2))
            else:
                raw = site.input
                norm = site.norm
                assert norm is not None
                if mean is None and (
                    decision.op != "styleforge::instance_norm" or norm.statistics is not None
                ):
                    out = self.call("instance_statistics", (raw,))
                    mean = self.graph.call_function(getitem, (out, 0))
                    variance = self.graph.call_function(getitem, (out, 1))
        if site.norm is not None and site.norm.statistics is not None:
            with self.graph.inserting_before(site.norm.node):  # where its eps is known, which may be a node
                out = self.call("norm_statistics", (raw, mean, variance, *site.norm.statistics))
                mean = self.graph.call_function(getitem, (out, 0))
                variance = self.graph.call_function(getitem, (out, 1))
        if decision.finish == "deferred":
            assert decision.deferred_to is not None
            self.pending[decision.deferred_to] = _Pending(raw, mean, variance, decision)
            return
        if decision.finish == "here":
            with self.graph.inserting_before(site.output):
                raw = self.finish(decision, raw, mean, variance)
        self.replace(site.output, raw, decision.dtype)

    def convolution(self, index: int, decision: Decision) -> fx.Node:
        """The ``conv2d`` call of a site, applying the finish that was deferred to it."""
        site = decision.site
        conv = site.conv
        assert conv is not None
        vertical, horizontal = conv.padding
        padding, mode = [horizontal, horizontal, vertical, vertical], "zeros"
        if isinstance(conv, ConvTranspose):
            more_below, more_right = conv.output_padding
            cuts = [(0, -more_right, 0, -more_below), *(crop.sizes for crop in site.crops)]
            padding = [sum(sizes) for sizes in zip(padding, *cuts, strict=True)]
        if site.pad is not None and any(site.pad.padding):
            padding = [a + b for a, b in zip(padding, site.pad.padding, strict=True)]
            mode = site.pad.mode
        pending = self.pending.get(index)
        before = "none" if site.before is None else str(site.before.activation)
        norm: tuple[Any, ...] = (None, None, None, None, 1.0, before, None)
        source = site.input
        if pending is not None:
            source, norm = pending.raw, self.finish_arguments(pending.site, pending.mean, pending.variance)
        out = self.call(
            "conv2d",
            (
                source, conv.weight, None if decision.drop_bias else conv.bias, *norm,
                site.upsample.factor if site.upsample else 1, padding, mode, list(conv.stride),
                str(site.function) if site.norm is None else "none",
                site.norm is not None and site.norm.mean is None,
                pending is not None and pending.decision.keep, decision.channels_last,
                isinstance(conv, ConvTranspose), decision.precision, self.written(decision),
                None,
            ),
        )  # fmt: skip
        if pending is not None and pending.decision.keep:
            kept = self.graph.call_function(getitem, (out, 3))
            if pending.decision.outside:
                self.convert(pending.decision, kept, decision.channels_last)
            self.replace(pending.site.output, kept, decision.storage)
        return out

    def written(self, decision: Decision) -> torch.dtype | None:
        """The dtype that a convolution is told to write; None for that of its storage."""
        finished = decision.finish == "none" and decision.dtype != decision.storage
        return decision.dtype if finished else None

    def convert(self, producer: Decision, kept: fx.Node, channels_last: bool) -> None:
        """Let the readers of a finished tensor that know nothing of how it is kept read it in their dtype."""
        old = producer.site.output
        asked = (kept, None, None, None, None, 1.0, "none", None, channels_last, *_STAY, None, producer.dtype)
        copy = self.call("normalize", asked)
        copy.meta.update(old.meta)
        self.copies[old] = copy
        old.replace_all_uses_with(copy, delete_user_cb=lambda user: user in producer.outside)

    def finish_arguments(self, site: Match, mean: Any, variance: Any) -> tuple[Any, ...]:
        """mean, variance, norm weight, norm bias, eps, activation, residual of a site's finish."""
        norm = site.norm
        residual = site.add.residual if site.add is not None else None
        if norm is None:  # the activation was the convolution's own
            return None, None, None, None, 1.0, "none", residual
        return mean, variance, norm.weight, norm.bias, norm.eps, str(site.function), residual

    def finish(self, decision: Decision, raw: fx.Node, mean: Any, variance: Any) -> fx.Node:
        """The op at the end of a site that writes its finished tensor."""
        site = decision.site
        *arguments, activation, residual = self.finish_arguments(site, mean, variance)
        if site.conv is None and mean is None:
            weight, bias, eps = arguments[2:]
            return self.call(
                "instance_norm", (raw, weight, bias, eps, activation, residual, decision.channels_last)
            )
        moves: tuple[Any, ...] = ()
        if site.moves:
            factor = site.upsample_after.factor if site.upsample_after else 1
            pad = site.pad_after
            moves = (factor, *((list(pad.padding), pad.mode) if pad else ([0, 0, 0, 0], "zeros")))
        converts = decision.dtype != decision.storage or decision.precision != "auto"
        if converts or site.slope is not None:
            moves = (*(moves or _STAY), site.slope, decision.dtype if converts else None)
        return self.call("normalize", (raw, *arguments, activation, residual, decision.channels_last, *moves))
