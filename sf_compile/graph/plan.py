"""Stage 3: decide, for every site, which op runs it, in which layout, and where its norm happens.

A site's norm, activation and addition are its *finish*. Where the finished tensor is read by
another fused convolution, the finish is deferred: that convolution applies it on the way in, and
the normalised tensor is not written on its own. Other readers of it (the skip path of a residual
block) then read the copy that the convolution keeps. Everywhere else the finish is an op of its own,
which upsamples and pads as well where nothing but that reads the finished tensor.

The plan is pure data, and ``str(plan)`` is a table of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sf_compile import tf32
from sf_compile.graph.normalize import NormalizedGraph, value_of
from sf_compile.graph.sites import Match, Matches
from sf_compile.options import Options
from sf_compile.precision import name_of, storage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """How one site runs.

    Attributes:
        site: What is replaced.
        op: The op that runs the site's anchor.
        finish: ``"none"`` (nothing to finish), ``"here"`` (by an op at the site's end), or
            ``"deferred"`` (on the way into ``deferred_to``).
        deferred_to: Index in the plan of the site that applies the finish; None unless deferred.
        keep: Whether the site that applies the finish also returns the finished tensor.
        channels_last: Layout of the site's raw output, and of its finished tensor.
        drop_bias: The convolution's bias is left out: the instance norm after it removes it.
        precision: What the convolution computes in, of ``sf_compile.precision``.
        storage: Dtype of the site's raw output, and of a finished tensor that is kept.
        dtype: Dtype of the site's output where it is written.
        outside: Readers of a kept tensor that get a copy in the dtype that they know.
        why: The reason for ``finish``, for a person.
    """

    site: Match
    op: str
    finish: str
    deferred_to: int | None
    keep: bool
    channels_last: bool
    drop_bias: bool
    precision: str
    storage: torch.dtype
    dtype: torch.dtype
    outside: tuple[fx.Node, ...]
    why: str

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        columns = f"{self.site.anchor.name:<16} {self.site.pattern:<32} {self.op:<28} {layout:<14}"
        return f"{columns} {precision_of(self):<6} {self.why}"


@dataclass(frozen=True)
class Plan:
    """One decision a site, in graph order."""

    decisions: tuple[Decision, ...]

    def __str__(self) -> str:
        return "\n".join(str(decision) for decision in self.decisions) or "(nothing to fuse)"


def plan(graph: NormalizedGraph, matches: Matches, options: Options) -> Plan:
    """Decide about every match of ``graph``; pure."""
    planner = _Planner(graph, matches.sites, options)
    decisions = tuple(planner.decide(i) for i in range(len(matches.sites)))
    for decision in decisions:
        log.debug("plan: %s", decision)
    return Plan(decisions)


def layout_of(node: fx.Node) -> bool:
    """Whether eager PyTorch returns this node's value in channels_last."""
    value = value_of(node)
    last = statically_known_true(value.stride(1) == 1)
    if statically_known_true(value.shape[1] == 1):
        # The pixels of one channel lie alike; its own stride tells, and PyTorch looks at it.
        return last and not statically_known_true(value.shape[2] * value.shape[3] == 1)
    return last and not statically_known_true(value.stride(3) == 1)


def prefers_channels_last(value: torch.Tensor, options: Options, dtype: torch.dtype | None = None) -> bool:
    """The layout of a tensor that only fused ops see; they store it in ``dtype`` or its own.

    Convolutions run on a GPU's tensor cores in channels_last, and oneDNN's on a CPU do too. Float32 on a GPU
    where TF32 is forbidden keeps the model's layout, so that cuDNN is asked what eager PyTorch asks.
    """
    if options.layout != "auto":
        return options.layout == "channels_last"
    dtype = dtype or value.dtype
    if dtype == torch.float32 and value.device.type == "cpu":
        return True
    if dtype in (torch.float16, torch.bfloat16):
        return True
    if dtype == torch.float32 and value.device.type == "cuda" and tf32.allowed(options.precision):
        return True
    return not statically_known_true(value.stride(3) == 1) and statically_known_true(value.stride(1) == 1)


class _Planner:
    def __init__(self, graph: NormalizedGraph, sites: Sequence[Match], options: Options) -> None:
        self.graph = graph
        self.sites = sites
        self.options = options
        self.order = {node: i for i, node in enumerate(graph.graph.nodes)}
        self.by_input: dict[fx.Node, list[int]] = {}
        self.inside: dict[fx.Node, int] = {}
        for i, site in enumerate(sites):
            if site.conv is not None:
                self.by_input.setdefault(site.input, []).append(i)
            self.inside.update((step.node, i) for step in site.steps)

    def decide(self, index: int) -> Decision:
        """The decision about one site."""
        site = self.sites[index]
        draft = Decision(
            site=site,
            op=self.op(site),
            finish="none",
            deferred_to=None,
            keep=False,
            channels_last=self.layout(site),
            drop_bias=self.drops_bias(site),
            precision=self.precision(site),
            storage=self.storage(site),
            dtype=self.dtype(site),
            outside=(),
            why="its output is the convolution's own",
        )
        if site.norm is None and site.add is None:
            return draft
        if site.moves or site.slope is not None:
            if site.conv is None and site.norm is not None and site.norm.mean is None:
                draft = replace(draft, op=self.statistics_op(site))
            if site.moves:
                why = f"normalised at its end, in one pass with {site.output.name}"
            else:
                why = "normalised at its end: the slope of its PReLU is a tensor"
            return replace(draft, finish="here", why=why)
        consumer, why = self.consumer(site)
        if consumer is None:
            return replace(draft, finish="here", why=why)
        keep = len(site.output.users) > 1
        converts = keep and self.storage(self.sites[consumer]) != value_of(site.output).dtype
        outside = tuple(self.outside(site)) if converts else ()
        if site.conv is None:
            draft = replace(draft, op=self.statistics_op(site))
        return replace(draft, finish="deferred", deferred_to=consumer, keep=keep, outside=outside, why=why)

    def op(self, site: Match) -> str:
        """The op of the anchor when the finish is not deferred."""
        if site.conv is not None:
            return "styleforge::conv2d"
        assert site.norm is not None
        same = value_of(site.norm.node).dtype == value_of(site.input).dtype
        plain = site.norm.mean is None and site.norm.statistics is None and same
        return "styleforge::instance_norm" if plain else "styleforge::normalize"

    def statistics_op(self, site: Match) -> str:
        """The op of a norm without a convolution, whose finish is deferred."""
        assert site.norm is not None
        return "styleforge::instance_statistics" if site.norm.mean is None else "(running statistics)"

    def drops_bias(self, site: Match) -> bool:
        """A bias before an instance norm has no effect; training still wants its (zero) gradient."""
        if site.conv is None or site.conv.bias is None or site.norm is None or site.norm.mean is not None:
            return False
        if site.norm.groups is not None:  # the mean of several channels does not remove the bias of each
            return False
        switches = any(node.target is torch._C._set_grad_enabled for node in self.graph.barriers)
        return not ((torch.is_grad_enabled() or switches) and value_of(site.conv.bias).requires_grad)

    def layout(self, site: Match) -> bool:
        """The layout of the site's output: the model's own where anything else reads it."""
        output = site.output
        if output.users and all(self.reads_any_layout(user, output) for user in output.users):
            return prefers_channels_last(value_of(site.anchor), self.options, self.storage(site))
        return layout_of(output)

    def reads_any_layout(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether ``user`` is the first step of a fused convolution, or a fused addition, of ``node``."""
        index = self.inside.get(user)
        if index is None:
            return False
        site = self.sites[index]
        first_of_conv = site.conv is not None and user is site.steps[0].node and site.input is node
        return first_of_conv or (site.add is not None and user is site.add.node)

    def precision(self, site: Match) -> str:
        """What the site's convolution is told: what was asked for, or the dtype that autocast gave it."""
        conv = site.conv
        if conv is None or self.options.precision != "auto":
            return "auto" if conv is None else self.options.precision
        operands = [node for node in (conv.input, conv.weight, conv.bias, site.input) if node is not None]
        dtype = value_of(conv.node).dtype
        return "auto" if all(value_of(node).dtype == dtype for node in operands) else name_of(dtype)

    def storage(self, site: Match) -> torch.dtype:
        """The dtype of the site's raw output; of a norm without a convolution, of what it normalises."""
        if site.conv is None:
            dtype: torch.dtype = value_of(site.input).dtype
            return dtype
        return storage(self.options.precision, value_of(site.conv.node).dtype)

    def dtype(self, site: Match) -> torch.dtype:
        """The dtype of what the site writes: eager's, but between fused convolutions of a set precision."""
        eager: torch.dtype = value_of(site.output).dtype
        forced = site.conv is not None and self.options.precision != "auto"
        inner = forced and bool(site.output.users) and not self.outside(site)
        return self.storage(site) if inner else eager

    def outside(self, site: Match) -> list[fx.Node]:
        """The readers of the site's output that are not of a fused convolution, and want eager's dtype."""
        output = site.output

        def converts(user: fx.Node) -> bool:
            inside = self.inside.get(user)
            return (
                inside is not None
                and self.sites[inside].conv is not None
                and self.reads_any_layout(user, output)
            )

        return [user for user in output.users if not converts(user)]

    def consumer(self, site: Match) -> tuple[int | None, str]:
        """The site that can apply this one's finish, and why, or why there is none."""
        readers = sorted(site.output.users, key=self.order.__getitem__)
        candidates = [i for i in self.by_input.get(site.output, ()) if self.sites[i] is not site]
        if not candidates:
            return None, "normalised at its end: no fused convolution reads it"
        if all(self.sites[i].before is not None for i in candidates):
            return None, "normalised at its end: what reads it has an activation of its own to apply"
        candidates = [i for i in candidates if self.sites[i].before is None]
        index = min(candidates, key=lambda i: self.order[self.sites[i].anchor])
        consumer = self.sites[index]
        anchor = self.order[consumer.anchor]
        others = [user for user in readers if user is not consumer.steps[0].node]
        early = [user.name for user in others if self.order[user] < anchor]
        if early:
            return None, f"normalised at its end: {early[0]} reads it before {consumer.anchor.name}"
        kept = self.storage(consumer)
        if self.precision(consumer) == "auto" and self.storage(site) != kept:
            return None, f"normalised at its end: {consumer.anchor.name} computes in another dtype"
        if others and self.options.precision == "auto" and value_of(site.output).dtype != kept:
            return None, f"normalised at its end: {others[0].name} reads it in another dtype"
        # A mode switch or an in-place write between the two could change what the finish would read.
        start = self.order[site.steps[0].node]
        for barrier in self.graph.barriers:
            if start < self.order[barrier] < anchor:
                between = f"{barrier.name} lies between it and {consumer.anchor.name}"
                return None, f"normalised at its end: {between}"
        # A convolution keeps its finished input in the layout of its output.
        if others and self.layout(site) != self.layout(consumer):
            return None, f"normalised at its end: {others[0].name} reads it in another layout"
        return index, f"normalised on the way into {consumer.anchor.name}" + (", and kept" if others else "")


def precision_of(decision: Decision) -> str:
    """What a site is computed in, by its name; float32 by that of its storage unless TF32 was asked for."""
    return "tf32" if decision.precision == "tf32" else name_of(decision.storage)


def describe(decision: Decision) -> dict[str, Any]:
    """A decision as plain data, for reports."""
    return {
        "op": decision.op,
        "finish": decision.finish,
        "layout": "channels_last" if decision.channels_last else "contiguous",
        "precision": precision_of(decision),
        "why": decision.why,
    }
